package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	mebibyte = int64(1) << 20
	gibibyte = int64(1) << 30
	// parameterPrefix marks what the sidecars add to a StorageClass's parameters.
	parameterPrefix = "csi.storage.k8s.io/"
)

// imageMetadata are the parameters that ceph-csi keeps as metadata of the image, so that somebody who
// holds only the image can tell whose it is.
var imageMetadata = []string{
	parameterPrefix + "pv/name", parameterPrefix + "pvc/name", parameterPrefix + "pvc/namespace",
}

type controllerServer struct {
	csi.UnimplementedControllerServer
	ceph  *cephCommands
	locks operationLocks
}

func newControllerServer(ceph *cephCommands) *controllerServer { return &controllerServer{ceph: ceph} }

// There is no publish capability, as in ceph-csi: attaching a volume is book-keeping between
// external-attacher and the API server, and nothing in Kubernetes stops a second writer.
func (s *controllerServer) ControllerGetCapabilities(
	context.Context, *csi.ControllerGetCapabilitiesRequest,
) (*csi.ControllerGetCapabilitiesResponse, error) {
	response := &csi.ControllerGetCapabilitiesResponse{}
	for _, capability := range []csi.ControllerServiceCapability_RPC_Type{
		csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME,
		csi.ControllerServiceCapability_RPC_EXPAND_VOLUME,
		csi.ControllerServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	} {
		response.Capabilities = append(response.Capabilities, &csi.ControllerServiceCapability{
			Type: &csi.ControllerServiceCapability_Rpc{
				Rpc: &csi.ControllerServiceCapability_RPC{Type: capability},
			},
		})
	}
	return response, nil
}

func (s *controllerServer) ValidateVolumeCapabilities(
	_ context.Context, request *csi.ValidateVolumeCapabilitiesRequest,
) (*csi.ValidateVolumeCapabilitiesResponse, error) {
	if err := checkCapabilities(request.GetVolumeCapabilities()); err != nil {
		return &csi.ValidateVolumeCapabilitiesResponse{Message: err.Error()}, nil
	}
	return &csi.ValidateVolumeCapabilitiesResponse{
		Confirmed: &csi.ValidateVolumeCapabilitiesResponse_Confirmed{
			VolumeCapabilities: request.GetVolumeCapabilities(),
		},
	}, nil
}

func checkCapabilities(capabilities []*csi.VolumeCapability) error {
	if len(capabilities) == 0 {
		return errors.New("volume Capabilities cannot be empty")
	}
	for _, capability := range capabilities {
		if capability.GetMount() == nil {
			return errors.New("only file system volumes are supported by the lab's driver")
		}
		switch capability.GetAccessMode().GetMode() {
		case csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER,
			csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER,
			csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER:
		default:
			return errors.New("multi node access modes are only supported on rbd `block` type volumes")
		}
	}
	return nil
}

// CreateVolume makes the image that the journal holds for this name, reserving it first where there
// is none. Killed at any point and repeated, it ends with one image and one entry.
func (s *controllerServer) CreateVolume(
	ctx context.Context, request *csi.CreateVolumeRequest,
) (*csi.CreateVolumeResponse, error) {
	parameters := request.GetParameters()
	clusterID, pool, features := parameters["clusterID"], parameters["pool"], parameters["imageFeatures"]
	switch {
	case request.GetName() == "":
		return nil, status.Error(codes.InvalidArgument, "volume Name cannot be empty")
	case clusterID == "":
		return nil, status.Error(codes.InvalidArgument, "clusterID must be set")
	case pool == "":
		return nil, status.Error(codes.InvalidArgument, "missing required parameter pool")
	case features == "":
		return nil, status.Error(codes.InvalidArgument, "empty imageFeatures parameter")
	case request.GetVolumeContentSource() != nil:
		return nil, status.Error(codes.InvalidArgument, "the lab's driver makes no volumes from snapshots or volumes")
	}
	if err := checkCapabilities(request.GetVolumeCapabilities()); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	release, err := s.locks.acquire(request.GetName())
	if err != nil {
		return nil, err
	}
	defer release()
	session, err := s.ceph.open(clusterID, request.GetSecrets())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	defer session.Close()

	poolID, err := session.poolID(ctx, pool)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	entry, err := findOrReserve(ctx, journal{session, pool}, request.GetName(), parameters[parameterPrefix+"pvc/namespace"])
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	size := wantedSize(request.GetCapacityRange())
	info, err := ensureImage(ctx, session, pool, entry, size, features)
	if err != nil {
		return nil, err
	}
	if err := setImageMetadata(ctx, session, pool+"/"+entry.imageName, parameters); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &csi.CreateVolumeResponse{Volume: &csi.Volume{
		VolumeId:      volumeID{clusterID: clusterID, poolID: poolID, uuid: entry.uuid}.String(),
		CapacityBytes: info.Size,
		VolumeContext: volumeContext(parameters, pool, entry.imageName),
	}}, nil
}

// findOrReserve returns the journal's entry for a name. A name that leads to an unfinished entry (its
// maker died in between) is undone and reserved anew.
func findOrReserve(ctx context.Context, j journal, name, owner string) (journalEntry, error) {
	uuid, err := j.lookUp(ctx, name)
	if err == nil {
		var entry journalEntry
		entry, err = j.read(ctx, uuid)
		if err == nil {
			return entry, nil
		}
		if errors.Is(err, errNoEntry) {
			err = j.undo(ctx, uuid, name)
		}
	} else if errors.Is(err, errNoEntry) {
		err = nil
	}
	if err != nil {
		return journalEntry{}, err
	}
	return j.reserve(ctx, name, owner)
}

// ensureImage makes the image unless an earlier call did, and notes its id in the journal.
func ensureImage(
	ctx context.Context, session *cephSession, pool string, entry journalEntry, size int64, features string,
) (imageInfo, error) {
	image := pool + "/" + entry.imageName
	info, err := session.imageInfo(ctx, image)
	if endedWith(err, exitNotFound) {
		_, err = session.run(ctx, "rbd", "create", image,
			"--size", strconv.FormatInt(size, 10)+"B", "--image-feature", features)
		if err != nil {
			return info, status.Errorf(codes.Internal, "create the image: %v", err)
		}
		info, err = session.imageInfo(ctx, image)
	}
	if err != nil {
		return info, status.Error(codes.Internal, err.Error())
	}
	if info.Size < size {
		return info, status.Errorf(codes.AlreadyExists,
			"volume with the same name (%s) but with different size already exists", entry.volumeName)
	}
	if entry.imageID == "" {
		if err := (journal{session, pool}).recordImageID(ctx, entry.uuid, info.ID); err != nil {
			return info, status.Error(codes.Internal, err.Error())
		}
	}
	return info, nil
}

func setImageMetadata(ctx context.Context, session *cephSession, image string, parameters map[string]string) error {
	for _, key := range imageMetadata {
		value := parameters[key]
		if value == "" {
			continue
		}
		if _, err := session.run(ctx, "rbd", "image-meta", "set", image, key, value); err != nil {
			return fmt.Errorf("set the image's metadata: %w", err)
		}
	}
	return nil
}

// volumeContext becomes the PersistentVolume's volumeAttributes: the class's own parameters and where
// the volume is.
func volumeContext(parameters map[string]string, pool, imageName string) map[string]string {
	result := maps.Clone(parameters)
	maps.DeleteFunc(result, func(key, _ string) bool { return strings.HasPrefix(key, parameterPrefix) })
	result["pool"], result["journalPool"], result["imageName"] = pool, pool, imageName
	return result
}

// wantedSize rounds up as ceph-csi does: to MiB below one GiB, to GiB above; one GiB where nothing is asked.
func wantedSize(capacity *csi.CapacityRange) int64 {
	if capacity == nil {
		return gibibyte
	}
	unit := gibibyte
	if capacity.GetRequiredBytes() < gibibyte {
		unit = mebibyte
	}
	return (capacity.GetRequiredBytes() + unit - 1) / unit * unit
}

// located is a volume found through its handle and the journal.
type located struct {
	journal journal
	entry   journalEntry
	image   string // pool/name
}

func locate(ctx context.Context, session *cephSession, id volumeID) (located, error) {
	pool, err := session.poolName(ctx, id.poolID)
	if err != nil {
		return located{}, err
	}
	j := journal{session, pool}
	entry, err := j.read(ctx, id.uuid)
	return located{j, entry, pool + "/" + entry.imageName}, err
}

// DeleteVolume does what ceph-csi does, which differs from what one expects: it moves the image that
// now bears the **name** into the trash and then asks for the image with the **id in the journal** to
// be removed from there. Normally these are one image. After a swap restore they are two (field notes
// C14), and the wrong one dies unless the journal was updated.
func (s *controllerServer) DeleteVolume(
	ctx context.Context, request *csi.DeleteVolumeRequest,
) (*csi.DeleteVolumeResponse, error) {
	if request.GetVolumeId() == "" {
		return nil, status.Error(codes.InvalidArgument, "empty volume ID in request")
	}
	id, err := parseVolumeID(request.GetVolumeId())
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	release, err := s.locks.acquire(request.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer release()
	session, err := s.ceph.open(id.clusterID, request.GetSecrets())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	defer session.Close()

	volume, err := locate(ctx, session, id)
	if errors.Is(err, errNoEntry) || errors.Is(err, errPoolNotFound) {
		// An earlier call finished: without an entry there is nothing left to delete.
		return &csi.DeleteVolumeResponse{}, nil
	}
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	releaseName, err := s.locks.acquire(volume.entry.volumeName)
	if err != nil {
		return nil, err
	}
	defer releaseName()
	if err := removeImage(ctx, session, volume); err != nil {
		return nil, err
	}
	if err := volume.journal.undo(ctx, id.uuid, volume.entry.volumeName); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &csi.DeleteVolumeResponse{}, nil
}

func removeImage(ctx context.Context, session *cephSession, volume located) error {
	inUse, err := session.inUse(ctx, volume.image)
	if endedWith(err, exitNotFound) {
		return finishRemoval(ctx, session, volume)
	}
	if err != nil {
		return status.Error(codes.Internal, err.Error())
	}
	if inUse {
		return status.Errorf(codes.Internal, "rbd %s is still being used", volume.entry.imageName)
	}
	imageID := volume.entry.imageID
	if imageID == "" {
		info, err := session.imageInfo(ctx, volume.image)
		if err != nil {
			return status.Error(codes.Internal, err.Error())
		}
		imageID = info.ID
	}
	if _, err := session.run(ctx, "rbd", "trash", "move", volume.image); err != nil {
		return status.Errorf(codes.Internal, "move the image to the trash: %v", err)
	}
	return removeFromTrash(ctx, session, volume.journal.pool, imageID)
}

// finishRemoval repeats the last step of a delete that died after the image was moved to the trash:
// ceph-csi finds it there by its name.
func finishRemoval(ctx context.Context, session *cephSession, volume located) error {
	var trash []struct {
		ID   string `json:"id"`
		Name string `json:"name"`
	}
	if err := session.runJSON(ctx, &trash, "rbd", "trash", "list", volume.journal.pool); err != nil {
		return status.Error(codes.Internal, err.Error())
	}
	for _, image := range trash {
		if image.Name == volume.entry.imageName {
			return removeFromTrash(ctx, session, volume.journal.pool, image.ID)
		}
	}
	return nil
}

// removeFromTrash hands the removal to the manager, which repeats it in the background. So an image
// with snapshots stays in the trash although the volume counts as deleted.
func removeFromTrash(ctx context.Context, session *cephSession, pool, imageID string) error {
	spec := pool + "/" + imageID
	_, err := session.run(ctx, "ceph", "rbd", "task", "add", "trash", "remove", spec)
	if endedWith(err, exitInvalid) {
		// A manager without the rbd_support module.
		_, err = session.run(ctx, "rbd", "trash", "remove", "--no-progress", spec)
	}
	if err != nil && !endedWith(err, exitNotFound) {
		return status.Errorf(codes.Internal, "remove the image from the trash: %v", err)
	}
	return nil
}

// ControllerExpandVolume grows the image; the node then grows the file system. It goes by the image's name.
func (s *controllerServer) ControllerExpandVolume(
	ctx context.Context, request *csi.ControllerExpandVolumeRequest,
) (*csi.ControllerExpandVolumeResponse, error) {
	if request.GetCapacityRange() == nil {
		return nil, status.Error(codes.InvalidArgument, "capacityRange cannot be empty")
	}
	id, err := parseVolumeID(request.GetVolumeId())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	release, err := s.locks.acquire(request.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer release()
	session, err := s.ceph.open(id.clusterID, request.GetSecrets())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	defer session.Close()

	volume, err := locate(ctx, session, id)
	if errors.Is(err, errNoEntry) || errors.Is(err, errPoolNotFound) {
		return nil, status.Errorf(codes.NotFound, "volume ID %s not found", request.GetVolumeId())
	}
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	info, err := session.imageInfo(ctx, volume.image)
	if endedWith(err, exitNotFound) {
		return nil, status.Errorf(codes.NotFound, "volume ID %s not found", request.GetVolumeId())
	}
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	size := wantedSize(request.GetCapacityRange())
	if info.Size < size {
		_, err := session.run(ctx, "rbd", "resize", volume.image,
			"--no-progress", "--size", strconv.FormatInt(size, 10)+"B")
		if err != nil {
			return nil, status.Errorf(codes.Internal, "resize the image: %v", err)
		}
		info.Size = size
	}
	return &csi.ControllerExpandVolumeResponse{CapacityBytes: info.Size, NodeExpansionRequired: true}, nil
}
