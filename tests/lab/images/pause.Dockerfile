# The process that holds a pod's namespaces; Kubernetes calls the image registry.k8s.io/pause.
FROM scratch
COPY --from=containerd /bin/pause /pause
USER 65535:65535
ENTRYPOINT ["/pause"]
