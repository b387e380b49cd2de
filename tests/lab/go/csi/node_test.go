package main

import "testing"

func TestOnlyTheKernelClientsOptionsReachTheKernel(t *testing.T) {
	for given, want := range map[string]string{
		"":                             "",
		"noshare":                      "noshare",
		"krbd:noshare":                 "noshare",
		"krbd:noshare,ro;nbd:debug-on": "noshare,ro",
		"nbd:debug-on":                 "",
	} {
		got, err := krbdOptions(given)
		if err != nil || got != want {
			t.Errorf("%q became %q, %v; want %q", given, got, err, want)
		}
	}
	if _, err := krbdOptions("fuse:x"); err == nil {
		t.Error("an unknown mounter was accepted")
	}
}

func TestTheRootIsAMountPointAndThisFolderIsNot(t *testing.T) {
	if mounted, err := isMountPoint("/"); err != nil || !mounted {
		t.Errorf("/ is %v, %v", mounted, err)
	}
	if mounted, err := isMountPoint(t.TempDir()); err != nil || mounted {
		t.Errorf("a fresh directory is %v, %v", mounted, err)
	}
}

func TestTheStashComesBackAsItWasWritten(t *testing.T) {
	parent := t.TempDir()
	if err := writeStash(parent, stash{"replicapool", "csi-vol-1"}); err != nil {
		t.Fatal(err)
	}
	if got, err := readStash(parent); err != nil || got != (stash{"replicapool", "csi-vol-1"}) {
		t.Fatalf("read %+v, %v", got, err)
	}
}
