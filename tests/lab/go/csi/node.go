package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ceph-csi's way of waiting for an image to become free: 10 looks, the pause growing by 1.4 from one
// second, 49 s in all (field notes C6: with the looks themselves 56-58 s).
const (
	watcherPolls      = 10
	watcherFirstPause = time.Second
	watcherPauseGrows = 1.4
)

// stashName is the file beside the mount that remembers what was mapped there: the call that unmaps
// brings nothing but the path.
const stashName = "image-meta.json"

type stash struct {
	Pool      string `json:"pool"`
	ImageName string `json:"image"`
}

type nodeServer struct {
	csi.UnimplementedNodeServer
	nodeID string
	ceph   *cephCommands
	locks  operationLocks
}

func newNodeServer(nodeID string, ceph *cephCommands) *nodeServer {
	return &nodeServer{nodeID: nodeID, ceph: ceph}
}

func (s *nodeServer) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{NodeId: s.nodeID}, nil
}

func (s *nodeServer) NodeGetCapabilities(
	context.Context, *csi.NodeGetCapabilitiesRequest,
) (*csi.NodeGetCapabilitiesResponse, error) {
	response := &csi.NodeGetCapabilitiesResponse{}
	for _, capability := range []csi.NodeServiceCapability_RPC_Type{
		csi.NodeServiceCapability_RPC_STAGE_UNSTAGE_VOLUME,
		csi.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		csi.NodeServiceCapability_RPC_EXPAND_VOLUME,
		csi.NodeServiceCapability_RPC_SINGLE_NODE_MULTI_WRITER,
	} {
		response.Capabilities = append(response.Capabilities, &csi.NodeServiceCapability{
			Type: &csi.NodeServiceCapability_Rpc{Rpc: &csi.NodeServiceCapability_RPC{Type: capability}},
		})
	}
	return response, nil
}

// stagingMount is where the volume's file system is mounted, below the directory kubelet gives.
func stagingMount(parent, volumeID string) string { return filepath.Join(parent, volumeID) }

// NodeStageVolume maps the image and mounts its file system, once per node and volume.
func (s *nodeServer) NodeStageVolume(
	ctx context.Context, request *csi.NodeStageVolumeRequest,
) (*csi.NodeStageVolumeResponse, error) {
	attributes := request.GetVolumeContext()
	pool, image := attributes["pool"], attributes["imageName"]
	switch {
	case request.GetVolumeId() == "":
		return nil, status.Error(codes.InvalidArgument, "volume ID missing in request")
	case request.GetStagingTargetPath() == "":
		return nil, status.Error(codes.InvalidArgument, "staging target path missing in request")
	case request.GetVolumeCapability().GetMount() == nil:
		return nil, status.Error(codes.InvalidArgument, "only file system volumes are supported by the lab's driver")
	case pool == "":
		return nil, status.Error(codes.InvalidArgument, "missing volume attribute pool")
	}
	if attributes["staticVolume"] == "true" {
		// A volume that somebody wrote by hand: its handle is the image's name.
		image = request.GetVolumeId()
	}
	if image == "" {
		return nil, status.Error(codes.InvalidArgument, "missing volume attribute imageName")
	}
	release, err := s.locks.acquire(request.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer release()
	target := stagingMount(request.GetStagingTargetPath(), request.GetVolumeId())
	mounted, err := isMountPoint(target)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	if mounted {
		return &csi.NodeStageVolumeResponse{}, nil
	}
	session, err := s.ceph.open(attributes["clusterID"], request.GetSecrets())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	defer session.Close()

	// Written before the image is mapped: whatever happens then, unstaging finds it.
	if err := writeStash(request.GetStagingTargetPath(), stash{pool, image}); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	if err := stage(ctx, session, request, pool, image, target); err != nil {
		if undo := unstage(ctx, request.GetStagingTargetPath(), target); undo != nil {
			log.Printf("undo the failed staging of %s: %v", request.GetVolumeId(), undo)
		}
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &csi.NodeStageVolumeResponse{}, nil
}

func stage(
	ctx context.Context, session *cephSession, request *csi.NodeStageVolumeRequest, pool, image, target string,
) error {
	device, err := mappedDevice(pool, image)
	if err != nil {
		return err
	}
	if device == "" {
		if err := waitUntilUnused(ctx, session, pool+"/"+image); err != nil {
			return err
		}
		device, err = mapImage(ctx, session, pool+"/"+image, request.GetVolumeContext()["mapOptions"])
		if err != nil {
			return err
		}
	}
	existed, err := formatIfBlank(ctx, device)
	if err != nil {
		return err
	}
	if existed {
		if err := checkFileSystem(ctx, device); err != nil {
			return fmt.Errorf("check the file system: %w", err)
		}
	}
	if err := os.MkdirAll(target, 0o750); err != nil {
		return err
	}
	options := append([]string{"_netdev"}, request.GetVolumeCapability().GetMount().GetMountFlags()...)
	if err := mount(ctx, options, "-t", "ext4", device, target); err != nil {
		return err
	}
	if !existed {
		return nil
	}
	// The image may have grown while it was mapped nowhere.
	_, err = execute(ctx, "resize2fs", device)
	return err
}

// waitUntilUnused is the refusal that in production alone keeps a second writer out while the first
// one is alive (field notes C6 and C10).
func waitUntilUnused(ctx context.Context, session *cephSession, image string) error {
	pause := watcherFirstPause
	for poll := 1; ; poll++ {
		inUse, err := session.inUse(ctx, image)
		if err != nil {
			return fmt.Errorf("fail to check rbd image status: (%w)", err)
		}
		if !inUse {
			return nil
		}
		if poll == watcherPolls {
			return fmt.Errorf("rbd image %s is still being used", image)
		}
		time.Sleep(pause)
		pause = time.Duration(float64(pause) * watcherPauseGrows)
	}
}

// mapImage maps with the kernel's client. noudev, because nobody in a container answers for udev.
func mapImage(ctx context.Context, session *cephSession, image, mapOptions string) (string, error) {
	arguments := []string{"map", image, "--device-type", "krbd", "--options", "noudev"}
	options, err := krbdOptions(mapOptions)
	if err != nil {
		return "", err
	}
	if options != "" {
		arguments = append(arguments, "--options", options)
	}
	output, err := session.run(ctx, "rbd", arguments...)
	if err != nil {
		return "", fmt.Errorf("rbd: map failed with error %w", err)
	}
	return strings.TrimSpace(string(output)), nil
}

// krbdOptions picks krbd's part of a class's mapOptions: "krbd:a,b;nbd:c", where options without a
// prefix are krbd's.
func krbdOptions(mapOptions string) (string, error) {
	var options []string
	for part := range strings.SplitSeq(mapOptions, ";") {
		mounter, list, prefixed := strings.Cut(part, ":")
		switch {
		case part == "":
		case !prefixed:
			options = append(options, part)
		case mounter == "krbd":
			options = append(options, list)
		case mounter != "nbd":
			return "", fmt.Errorf("unknown mounter type: %q, please specify mounter type", mounter)
		}
	}
	return strings.Join(options, ","), nil
}

// NodeUnstageVolume undoes staging, however far that came.
func (s *nodeServer) NodeUnstageVolume(
	ctx context.Context, request *csi.NodeUnstageVolumeRequest,
) (*csi.NodeUnstageVolumeResponse, error) {
	if request.GetVolumeId() == "" || request.GetStagingTargetPath() == "" {
		return nil, status.Error(codes.InvalidArgument, "volume ID or staging target path missing in request")
	}
	release, err := s.locks.acquire(request.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer release()
	parent := request.GetStagingTargetPath()
	if err := unstage(ctx, parent, stagingMount(parent, request.GetVolumeId())); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &csi.NodeUnstageVolumeResponse{}, nil
}

func unstage(ctx context.Context, parent, target string) error {
	if err := unmountAndRemove(ctx, target); err != nil {
		return fmt.Errorf("unmount the staged volume: %w", err)
	}
	staged, err := readStash(parent)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	device, err := mappedDevice(staged.Pool, staged.ImageName)
	if err != nil {
		return err
	}
	if device != "" {
		if _, err := execute(ctx, "rbd", "--conf", os.DevNull, "unmap", device, "--options", "noudev"); err != nil {
			return fmt.Errorf("unmap the image: %w", err)
		}
	}
	return os.Remove(filepath.Join(parent, stashName))
}

func writeStash(parent string, staged stash) error {
	content, err := json.Marshal(staged)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(parent, 0o750); err != nil {
		return err
	}
	temporary := filepath.Join(parent, stashName+".new")
	if err := os.WriteFile(temporary, content, 0o600); err != nil {
		return fmt.Errorf("remember the image: %w", err)
	}
	return os.Rename(temporary, filepath.Join(parent, stashName))
}

func readStash(parent string) (stash, error) {
	var staged stash
	content, err := os.ReadFile(filepath.Join(parent, stashName))
	if err != nil {
		return staged, err
	}
	if err := json.Unmarshal(content, &staged); err != nil {
		return staged, fmt.Errorf("read %s: %w", stashName, err)
	}
	return staged, nil
}

// NodePublishVolume shows the staged file system to one pod.
func (s *nodeServer) NodePublishVolume(
	ctx context.Context, request *csi.NodePublishVolumeRequest,
) (*csi.NodePublishVolumeResponse, error) {
	target := request.GetTargetPath()
	if request.GetVolumeId() == "" || target == "" || request.GetStagingTargetPath() == "" {
		return nil, status.Error(codes.InvalidArgument, "volume ID, target path or staging target path missing in request")
	}
	mounted, err := isMountPoint(target)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	if mounted {
		return &csi.NodePublishVolumeResponse{}, nil
	}
	if err := os.MkdirAll(target, 0o750); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	options := append([]string{"bind", "_netdev"}, request.GetVolumeCapability().GetMount().GetMountFlags()...)
	if request.GetReadonly() {
		options = append(options, "ro")
	}
	staged := stagingMount(request.GetStagingTargetPath(), request.GetVolumeId())
	if err := mount(ctx, options, staged, target); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

func (s *nodeServer) NodeUnpublishVolume(
	ctx context.Context, request *csi.NodeUnpublishVolumeRequest,
) (*csi.NodeUnpublishVolumeResponse, error) {
	if request.GetTargetPath() == "" {
		return nil, status.Error(codes.InvalidArgument, "target path missing in request")
	}
	if err := unmountAndRemove(ctx, request.GetTargetPath()); err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

// NodeExpandVolume grows the mounted file system to the image's size.
func (s *nodeServer) NodeExpandVolume(
	ctx context.Context, request *csi.NodeExpandVolumeRequest,
) (*csi.NodeExpandVolumeResponse, error) {
	parent := request.GetStagingTargetPath()
	if request.GetVolumeId() == "" || parent == "" {
		return nil, status.Error(codes.InvalidArgument, "volume ID or staging target path missing in request")
	}
	release, err := s.locks.acquire(request.GetVolumeId())
	if err != nil {
		return nil, err
	}
	defer release()
	staged, err := readStash(parent)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	device, err := mappedDevice(staged.Pool, staged.ImageName)
	if err == nil && device == "" {
		err = fmt.Errorf("rbd: %s/%s is not a mapped image", staged.Pool, staged.ImageName)
	}
	if err == nil {
		_, err = execute(ctx, "resize2fs", device)
	}
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	return &csi.NodeExpandVolumeResponse{}, nil
}

// NodeGetVolumeStats is what kubelet's metrics say of the volume.
func (s *nodeServer) NodeGetVolumeStats(
	_ context.Context, request *csi.NodeGetVolumeStatsRequest,
) (*csi.NodeGetVolumeStatsResponse, error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(request.GetVolumePath(), &stat); err != nil {
		return nil, status.Errorf(codes.NotFound, "read the volume's statistics: %v", err)
	}
	block := int64(stat.Bsize)
	return &csi.NodeGetVolumeStatsResponse{Usage: []*csi.VolumeUsage{
		{
			Unit:  csi.VolumeUsage_BYTES,
			Total: int64(stat.Blocks) * block, Available: int64(stat.Bavail) * block,
			Used: int64(stat.Blocks-stat.Bfree) * block,
		},
		{
			Unit:  csi.VolumeUsage_INODES,
			Total: int64(stat.Files), Available: int64(stat.Ffree), Used: int64(stat.Files - stat.Ffree),
		},
	}}, nil
}
