package main

import (
	"maps"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

func TestSizesAreRoundedUpAsCephCSIDoes(t *testing.T) {
	for required, want := range map[int64]int64{
		1:                  mebibyte,
		mebibyte:           mebibyte,
		mebibyte + 1:       2 * mebibyte,
		gibibyte:           gibibyte,
		gibibyte + 1:       2 * gibibyte,
		5*gibibyte/2 + 100: 3 * gibibyte,
	} {
		if got := wantedSize(&csi.CapacityRange{RequiredBytes: required}); got != want {
			t.Errorf("%d became %d, want %d", required, got, want)
		}
	}
	if got := wantedSize(nil); got != gibibyte {
		t.Errorf("no size became %d", got)
	}
}

func TestVolumeAttributesHoldTheClassAndThePlace(t *testing.T) {
	parameters := map[string]string{
		"clusterID": "rook-ceph", "pool": "replicapool", "imageFormat": "2", "mapOptions": "krbd:noshare",
		"csi.storage.k8s.io/pv/name": "pvc-1", "csi.storage.k8s.io/pvc/name": "data",
	}
	got := volumeContext(parameters, "replicapool", "csi-vol-1")
	want := map[string]string{
		"clusterID": "rook-ceph", "pool": "replicapool", "imageFormat": "2", "mapOptions": "krbd:noshare",
		"journalPool": "replicapool", "imageName": "csi-vol-1",
	}
	if !maps.Equal(got, want) {
		t.Fatalf("attributes are %v", got)
	}
}

func TestOnlyOneNodeMayWrite(t *testing.T) {
	capability := func(mode csi.VolumeCapability_AccessMode_Mode) []*csi.VolumeCapability {
		return []*csi.VolumeCapability{{
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
		}}
	}
	if err := checkCapabilities(capability(csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER)); err != nil {
		t.Errorf("a single node was refused: %v", err)
	}
	if err := checkCapabilities(capability(csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER)); err == nil {
		t.Error("several nodes were accepted")
	}
	if err := checkCapabilities(nil); err == nil {
		t.Error("no capability was accepted")
	}
}
