package main

import (
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// operationLocks lets one operation at a time work on a volume. A second one is turned away, not
// queued: the caller repeats it, and kubelet and the sidecars do.
type operationLocks struct{ held sync.Map }

// acquire returns the function that lets go, or the Aborted error ceph-csi answers with.
func (l *operationLocks) acquire(name string) (func(), error) {
	if _, busy := l.held.LoadOrStore(name, struct{}{}); busy {
		return nil, status.Errorf(codes.Aborted, "an operation with the given Volume ID %s already exists", name)
	}
	return func() { l.held.Delete(name) }, nil
}
