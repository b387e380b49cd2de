// Package containerd has no code: its go.mod names, as tools, what a node runs besides Kubernetes
// (containerd, its shim, ctr, and the CNI plug-ins), and ./pause is the pod sandbox's process.
package containerd
