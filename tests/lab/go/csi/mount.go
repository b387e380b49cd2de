package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

const (
	// exitBlank is how blkid says that it found nothing.
	exitBlank = 2
	// exitFsckRepaired and below: the file system is clean or was made clean.
	exitFsckRepaired = 1
)

// isMountPoint reads the kernel's own table: comparing device numbers misses bind mounts.
func isMountPoint(path string) (bool, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return false, err
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		// The fifth field is the mount point, with blanks written in octal.
		fields := strings.Fields(lines.Text())
		if len(fields) > 4 && strings.ReplaceAll(fields[4], `\040`, " ") == path {
			return true, nil
		}
	}
	return false, lines.Err()
}

// formatIfBlank makes an ext4 on a device that holds nothing. Anything that blkid recognises, or that
// it cannot read, is left alone. It says whether there was a file system before.
func formatIfBlank(ctx context.Context, device string) (bool, error) {
	output, err := execute(ctx, "blkid", "-p", "-s", "TYPE", "-s", "PTTYPE", "-o", "export", device)
	if err == nil {
		if !strings.Contains(string(output), "TYPE=ext4\n") {
			return true, fmt.Errorf("mount %s: it holds something else than ext4: %s",
				device, strings.TrimSpace(string(output)))
		}
		return true, nil
	}
	if !endedWith(err, exitBlank) {
		return false, fmt.Errorf("look for a file system: %w", err)
	}
	// The same options as ceph-csi. They are safe only because a fresh image reads as zeros.
	_, err = execute(ctx, "mkfs.ext4", "-m0", "-Enodiscard,lazy_itable_init=1,lazy_journal_init=1", device)
	return false, err
}

// checkFileSystem replays and repairs what can be repaired without asking, as Kubernetes' own
// format-and-mount does before each mount.
func checkFileSystem(ctx context.Context, device string) error {
	_, err := execute(ctx, "fsck", "-a", device)
	var failed *commandError
	if errors.As(err, &failed) && failed.exit <= exitFsckRepaired {
		return nil
	}
	return err
}

func mount(ctx context.Context, options []string, arguments ...string) error {
	_, err := execute(ctx, "mount", append([]string{"-o", strings.Join(options, ",")}, arguments...)...)
	return err
}

// unmountAndRemove leaves neither mount nor mount point at path, and is content when there is none.
func unmountAndRemove(ctx context.Context, path string) error {
	mounted, err := isMountPoint(path)
	if err != nil {
		return err
	}
	if mounted {
		if _, err := execute(ctx, "umount", path); err != nil {
			return err
		}
	}
	// Never recursive: had the unmount not happened, this would delete the volume's content.
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return err
	}
	return nil
}

// rbdDevices is where the kernel lists what it has mapped.
const rbdDevices = "/sys/bus/rbd/devices"

// mappedDevice finds the block device of a mapped image, or "".
func mappedDevice(pool, image string) (string, error) {
	entries, err := os.ReadDir(rbdDevices)
	if os.IsNotExist(err) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	for _, entry := range entries {
		attribute := func(name string) string {
			// A device that goes away while we read has no attributes and matches nothing.
			content, _ := os.ReadFile(filepath.Join(rbdDevices, entry.Name(), name))
			return strings.TrimSpace(string(content))
		}
		if attribute("pool") == pool && attribute("name") == image && attribute("current_snap") == "-" {
			return "/dev/rbd" + entry.Name(), nil
		}
	}
	return "", nil
}
