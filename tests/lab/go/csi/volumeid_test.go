package main

import "testing"

func TestHandlesReadBackWhatWasWritten(t *testing.T) {
	want := volumeID{clusterID: "rook-ceph", poolID: 1, uuid: "92837648-1431-41eb-8990-0242ac110005"}
	handle := want.String()
	if handle != "0001-0009-rook-ceph-0000000000000001-92837648-1431-41eb-8990-0242ac110005" {
		t.Fatalf("handle is %s", handle)
	}
	got, err := parseVolumeID(handle)
	if err != nil || got != want {
		t.Fatalf("read back %+v, %v", got, err)
	}
}

func TestHandlesOfOthersAreRefused(t *testing.T) {
	for _, handle := range []string{
		"",
		"csi-vol-x",
		"0002-0009-rook-ceph-0000000000000001-92837648-1431-41eb-8990-0242ac110005",
		"0001-0008-rook-ceph-0000000000000001-92837648-1431-41eb-8990-0242ac110005",
		"0001-zzzz-rook-ceph-0000000000000001-92837648-1431-41eb-8990-0242ac110005",
		"0001-0009-rook-ceph-000000000000000x-92837648-1431-41eb-8990-0242ac110005",
		"0001-0009-rook-ceph-0000000000000001-92837648-1431-41eb-8990-0242ac11000",
		"0001-ffff-rook-ceph-0000000000000001-92837648-1431-41eb-8990-0242ac110005",
	} {
		if got, err := parseVolumeID(handle); err == nil {
			t.Errorf("%q was read as %+v", handle, got)
		}
	}
}

func TestUUIDsAreVersionFour(t *testing.T) {
	uuid := newUUID()
	if len(uuid) != uuidLength || uuid[14] != '4' || uuid == newUUID() {
		t.Fatalf("made %q", uuid)
	}
}
