package main

import (
	"context"
	"errors"
	"fmt"
)

// The journal ties the name Kubernetes gave (pvc-UID) to the volume's uuid and image, in the pool's
// omap, exactly where and how ceph-csi keeps it. It makes CreateVolume idempotent, and it is what
// DeleteVolume goes by.
const (
	journalDirectory    = "csi.volumes.default"
	journalVolumePrefix = "csi.volume."

	keyVolumeName = "csi.volname"
	keyImageName  = "csi.imagename"
	keyImageID    = "csi.imageid"
	keyOwner      = "csi.volume.owner"
)

// uuidAttemptsMax bounds the search for an unused uuid; a second attempt is already a wonder.
const uuidAttemptsMax = 5

// errNoEntry: the journal does not know the volume, so it was never made or is already gone.
var errNoEntry = errors.New("key not found")

// journal is the journal of one pool.
type journal struct {
	session *cephSession
	pool    string
}

// journalEntry is one volume's omap.
type journalEntry struct {
	uuid       string
	volumeName string
	imageName  string
	imageID    string
}

// lookUp finds the uuid reserved for a name, or errNoEntry.
func (j journal) lookUp(ctx context.Context, volumeName string) (string, error) {
	return j.get(ctx, journalDirectory, journalVolumePrefix+volumeName)
}

// reserve claims a uuid for a name, in ceph-csi's order: the uuid's own object first, so that no two
// names can share one, then the name, then what the uuid stands for.
func (j journal) reserve(ctx context.Context, volumeName, owner string) (journalEntry, error) {
	var uuid string
	for attempt := 1; ; attempt++ {
		uuid = newUUID()
		_, err := j.rados(ctx, "create", journalVolumePrefix+uuid)
		if err == nil {
			break
		}
		if !radosExists(err) || attempt == uuidAttemptsMax {
			return journalEntry{}, fmt.Errorf("claim a uuid in the journal: %w", err)
		}
	}
	entry := journalEntry{uuid: uuid, volumeName: volumeName, imageName: imagePrefix + uuid}
	if err := j.set(ctx, journalDirectory, journalVolumePrefix+volumeName, uuid); err != nil {
		return entry, err
	}
	object := journalVolumePrefix + uuid
	values := [][2]string{{keyVolumeName, volumeName}, {keyImageName, entry.imageName}}
	if owner != "" {
		values = append(values, [2]string{keyOwner, owner})
	}
	for _, value := range values {
		if err := j.set(ctx, object, value[0], value[1]); err != nil {
			return entry, err
		}
	}
	return entry, nil
}

// read reads one volume's entry, or errNoEntry. The image id is missing while the image is not made.
func (j journal) read(ctx context.Context, uuid string) (journalEntry, error) {
	object := journalVolumePrefix + uuid
	entry := journalEntry{uuid: uuid}
	for key, value := range map[string]*string{
		keyVolumeName: &entry.volumeName, keyImageName: &entry.imageName, keyImageID: &entry.imageID,
	} {
		got, err := j.get(ctx, object, key)
		if err != nil && (key != keyImageID || !errors.Is(err, errNoEntry)) {
			return entry, err
		}
		*value = got
	}
	return entry, nil
}

// recordImageID notes the image's immutable id; deleting goes by it.
func (j journal) recordImageID(ctx context.Context, uuid, imageID string) error {
	return j.set(ctx, journalVolumePrefix+uuid, keyImageID, imageID)
}

// undo removes a reservation: first the name, so that a crash in between leaves an orphaned uuid
// object and never a name that leads nowhere.
func (j journal) undo(ctx context.Context, uuid, volumeName string) error {
	_, err := j.rados(ctx, "rmomapkey", journalDirectory, journalVolumePrefix+volumeName)
	if err != nil && !radosMissed(err) {
		return fmt.Errorf("remove the name from the journal: %w", err)
	}
	_, err = j.rados(ctx, "rm", journalVolumePrefix+uuid)
	if err != nil && !radosMissed(err) {
		return fmt.Errorf("remove the volume from the journal: %w", err)
	}
	return nil
}

func (j journal) set(ctx context.Context, object, key, value string) error {
	if _, err := j.rados(ctx, "setomapval", object, key, value); err != nil {
		return fmt.Errorf("write %s of %s in the journal: %w", key, object, err)
	}
	return nil
}

func (j journal) get(ctx context.Context, object, key string) (string, error) {
	output, err := j.rados(ctx, "getomapval", object, key, "/dev/stdout")
	if radosMissed(err) {
		return "", fmt.Errorf("%w: %s of %s", errNoEntry, key, object)
	}
	if err != nil {
		return "", fmt.Errorf("read %s of %s in the journal: %w", key, object, err)
	}
	return string(output), nil
}

func (j journal) rados(ctx context.Context, arguments ...string) ([]byte, error) {
	return j.session.run(ctx, "rados", append([]string{"--pool", j.pool}, arguments...)...)
}
