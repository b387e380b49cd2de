// howdah-lab-csi is the lab's RBD storage driver. To Kubernetes, to Ceph and so to howdah it looks
// and behaves like ceph-csi v3.12 as Rook installs it: the same volume handles and attributes, the
// same journal in the pool, the same refusals and the same leftovers. It is needed because ceph-csi
// links librbd and is not to be had as a Go module.
//
// Left out, because nothing in the lab asks for it: CSI snapshots and clones, encryption, NBD,
// topology, mirroring, raw block volumes and RADOS namespaces.
package main

import (
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
)

// settings is everything the command line says.
type settings struct {
	mode       string // controller or node
	driverName string
	endpoint   string
	nodeID     string
	clusters   clusterMonitors
	kubelet    string
}

// clusterMonitors maps a clusterID, as StorageClasses and volume handles name it, to its monitors.
type clusterMonitors map[string]string

func (c clusterMonitors) String() string { return fmt.Sprint(map[string]string(c)) }

// Set reads one CLUSTER_ID=MONITORS pair; several monitors are separated by commas.
func (c clusterMonitors) Set(pair string) error {
	id, monitors, found := strings.Cut(pair, "=")
	if !found || id == "" || monitors == "" {
		return fmt.Errorf("read %q: want CLUSTER_ID=MONITOR[,MONITOR...]", pair)
	}
	c[id] = monitors
	return nil
}

func readSettings(arguments []string) (settings, error) {
	s := settings{clusters: clusterMonitors{}}
	flags := flag.NewFlagSet("howdah-lab-csi", flag.ContinueOnError)
	flags.StringVar(&s.mode, "mode", "", "controller or node")
	flags.StringVar(&s.driverName, "driver-name", "rook-ceph.rbd.csi.ceph.com", "name of the driver")
	flags.StringVar(&s.endpoint, "endpoint", "",
		"path of the unix socket to serve CSI on (mode node: the driver's own in kubelet's directory)")
	flags.StringVar(&s.nodeID, "node-id", "", "name of this node (mode node)")
	flags.StringVar(&s.kubelet, "kubelet-dir", "/var/lib/kubelet", "kubelet's root directory (mode node)")
	flags.Var(s.clusters, "cluster", "CLUSTER_ID=MONITORS, may be given several times")
	if err := flags.Parse(arguments); err != nil {
		return s, err
	}
	if s.mode == "node" && s.endpoint == "" {
		s.endpoint = filepath.Join(s.kubelet, "plugins", s.driverName, "csi.sock")
	}
	switch {
	case s.mode != "controller" && s.mode != "node":
		return s, fmt.Errorf("read --mode %q: want controller or node", s.mode)
	case s.mode == "node" && s.nodeID == "":
		return s, fmt.Errorf("read --node-id: mode node needs the node's name")
	case s.endpoint == "":
		return s, fmt.Errorf("read --endpoint: want the path of a unix socket")
	case len(s.clusters) == 0:
		return s, fmt.Errorf("read --cluster: want at least one CLUSTER_ID=MONITORS")
	case flags.NArg() != 0:
		return s, fmt.Errorf("read arguments: %q is not a flag", flags.Arg(0))
	}
	return s, nil
}

func main() {
	log.SetFlags(log.LstdFlags | log.Lmicroseconds)
	s, err := readSettings(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	if err := run(s); err != nil {
		log.Fatal(err)
	}
}

func run(s settings) error {
	ceph := &cephCommands{clusters: s.clusters}
	server := grpc.NewServer(grpc.UnaryInterceptor(logCall))
	csi.RegisterIdentityServer(server, &identityServer{driverName: s.driverName, controller: s.mode == "controller"})
	if s.mode == "controller" {
		csi.RegisterControllerServer(server, newControllerServer(ceph))
	} else {
		csi.RegisterNodeServer(server, newNodeServer(s.nodeID, ceph))
	}
	listener, err := listenOnSocket(s.endpoint)
	if err != nil {
		return err
	}

	failed := make(chan error, 2)
	go func() { failed <- server.Serve(listener) }()
	servers := []*grpc.Server{server}
	if s.mode == "node" {
		registration, err := registerWithKubelet(s, failed)
		if err != nil {
			return err
		}
		servers = append(servers, registration)
	}
	log.Printf("serve the %s service of %s on %s", s.mode, s.driverName, s.endpoint)

	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	select {
	case err := <-failed:
		return fmt.Errorf("serve: %w", err)
	case got := <-stop:
		log.Printf("stop on %s", got)
		// Not graceful: a stage may poll for a minute, and every call is repeatable.
		for _, one := range servers {
			one.Stop()
		}
		return nil
	}
}

// listenOnSocket replaces what a killed predecessor left at path.
func listenOnSocket(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return nil, fmt.Errorf("make the socket's directory: %w", err)
	}
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return nil, fmt.Errorf("remove the stale socket: %w", err)
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return listener, nil
}
