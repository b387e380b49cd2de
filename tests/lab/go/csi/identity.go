package main

import (
	"context"
	"log"
	"path"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// driverVersion is the ceph-csi release whose behaviour this driver follows.
const driverVersion = "v3.12.2-lab"

type identityServer struct {
	csi.UnimplementedIdentityServer
	driverName string
	controller bool
}

func (s *identityServer) GetPluginInfo(
	context.Context, *csi.GetPluginInfoRequest,
) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: s.driverName, VendorVersion: driverVersion}, nil
}

func (s *identityServer) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{Ready: wrapperspb.Bool(true)}, nil
}

func (s *identityServer) GetPluginCapabilities(
	context.Context, *csi.GetPluginCapabilitiesRequest,
) (*csi.GetPluginCapabilitiesResponse, error) {
	response := &csi.GetPluginCapabilitiesResponse{}
	if s.controller {
		response.Capabilities = []*csi.PluginCapability{
			{Type: &csi.PluginCapability_Service_{Service: &csi.PluginCapability_Service{
				Type: csi.PluginCapability_Service_CONTROLLER_SERVICE,
			}}},
			{Type: &csi.PluginCapability_VolumeExpansion_{VolumeExpansion: &csi.PluginCapability_VolumeExpansion{
				Type: csi.PluginCapability_VolumeExpansion_ONLINE,
			}}},
		}
	}
	return response, nil
}

// logCall writes one line for each call that changes something or fails; secrets are never in it. A caller
// that gives up does not stop the call: like ceph-csi we finish, and the caller's next try finds it done.
func logCall(
	ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler,
) (any, error) {
	began := time.Now()
	response, err := handler(context.WithoutCancel(ctx), request)
	method := path.Base(info.FullMethod)
	volume := ""
	switch r := request.(type) {
	case interface{ GetVolumeId() string }:
		volume = r.GetVolumeId()
	case interface{ GetName() string }:
		volume = r.GetName()
	}
	took := time.Since(began).Milliseconds()
	switch {
	case err != nil:
		log.Printf("%s %s failed duration_ms=%d: %v", method, volume, took, err)
	case volume != "":
		log.Printf("%s %s done duration_ms=%d", method, volume, took)
	}
	return response, err
}
