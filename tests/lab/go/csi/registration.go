package main

import (
	"context"
	"fmt"
	"log"
	"path/filepath"

	"google.golang.org/grpc"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// registrationServer tells kubelet of this driver, as node-driver-registrar does beside ceph-csi.
type registrationServer struct {
	registration.UnimplementedRegistrationServer
	driverName string
	endpoint   string
	failed     chan<- error
}

// registerWithKubelet serves the socket that kubelet's plug-in watcher looks for. Kubelet connects
// whenever it starts, so this server lives as long as the driver.
func registerWithKubelet(s settings, failed chan<- error) (*grpc.Server, error) {
	listener, err := listenOnSocket(filepath.Join(s.kubelet, "plugins_registry", s.driverName+"-reg.sock"))
	if err != nil {
		return nil, err
	}
	server := grpc.NewServer()
	registration.RegisterRegistrationServer(server, &registrationServer{
		driverName: s.driverName, endpoint: s.endpoint, failed: failed,
	})
	go func() { failed <- server.Serve(listener) }()
	return server, nil
}

func (s *registrationServer) GetInfo(
	context.Context, *registration.InfoRequest,
) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{
		Type:              registration.CSIPlugin,
		Name:              s.driverName,
		Endpoint:          s.endpoint,
		SupportedVersions: []string{"1.0.0"},
	}, nil
}

// NotifyRegistrationStatus ends the process when kubelet refuses, so that whoever started it tries again.
func (s *registrationServer) NotifyRegistrationStatus(
	_ context.Context, status *registration.RegistrationStatus,
) (*registration.RegistrationStatusResponse, error) {
	if status.GetPluginRegistered() {
		log.Printf("kubelet registered %s", s.driverName)
	} else {
		s.failed <- fmt.Errorf("register with kubelet: %s", status.GetError())
	}
	return &registration.RegistrationStatusResponse{}, nil
}
