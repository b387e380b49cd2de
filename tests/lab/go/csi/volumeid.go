package main

import (
	"crypto/rand"
	"fmt"
	"strconv"
	"strings"
)

const (
	// handleVersion is the only encoding of volume handles that ceph-csi has had.
	handleVersion = "0001"
	imagePrefix   = "csi-vol-"
	uuidLength    = 36
	poolIDLength  = 16
)

// volumeID is what a volume handle holds:
// version(4 hex)-length of the cluster id(4 hex)-cluster id-pool id(16 hex)-uuid(36).
type volumeID struct {
	clusterID string
	poolID    int64
	uuid      string
}

func (v volumeID) String() string {
	return fmt.Sprintf("%s-%04x-%s-%016x-%s", handleVersion, len(v.clusterID), v.clusterID, v.poolID, v.uuid)
}

// parseVolumeID takes a handle apart. The cluster id may itself hold dashes, so its length decides.
func parseVolumeID(handle string) (volumeID, error) {
	wrong := func(what string) (volumeID, error) {
		return volumeID{}, fmt.Errorf("read volume handle %q: %s", handle, what)
	}
	rest, found := strings.CutPrefix(handle, handleVersion+"-")
	if !found || len(rest) < 5 || rest[4] != '-' {
		return wrong("want " + handleVersion + "-LENGTH-...")
	}
	length, err := strconv.ParseUint(rest[:4], 16, 16)
	if err != nil {
		return wrong("the length is not hexadecimal")
	}
	rest = rest[5:]
	if len(rest) != int(length)+1+poolIDLength+1+uuidLength {
		return wrong("its length is wrong")
	}
	cluster, rest := rest[:length], rest[length:]
	pool, uuid := rest[1:1+poolIDLength], rest[2+poolIDLength:]
	if rest[0] != '-' || rest[1+poolIDLength] != '-' {
		return wrong("a dash is missing")
	}
	poolID, err := strconv.ParseInt(pool, 16, 64)
	if err != nil {
		return wrong("the pool id is not hexadecimal")
	}
	return volumeID{clusterID: cluster, poolID: poolID, uuid: uuid}, nil
}

// newUUID makes a random (version 4) UUID.
func newUUID() string {
	var b [16]byte
	// crypto/rand.Read never fails: it ends the process when the system has no randomness.
	_, _ = rand.Read(b[:])
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
