package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// commandTimeout ends a command that hangs although Ceph's own limits (60 s in the kernel, 300 s in the
// libraries) have passed. Ending `rbd map` half-way leaves a lock behind, so it comes last.
const commandTimeout = 330 * time.Second

// Exit codes of rbd and ceph are errno values; rados always ends with 1 and only says what was wrong.
const (
	// exitNotFound is ENOENT.
	exitNotFound = 2
	// exitInvalid is EINVAL: how `ceph` answers a command that no manager module serves.
	exitInvalid = 22
)

// cephCommands runs rbd, rados and ceph against the clusters named on our command line.
type cephCommands struct {
	clusters clusterMonitors
	// pools remembers each cluster's pools, whose ids never change for as long as they live: the lab removes none.
	pools sync.Map
}

// credentials are one Ceph user, from the secret that came with the call.
type credentials struct {
	user string
	key  string
}

func credentialsFrom(secrets map[string]string) (credentials, error) {
	c := credentials{user: secrets["userID"], key: secrets["userKey"]}
	if c.user == "" {
		return c, errors.New("missing ID field 'userID' in secrets")
	}
	if c.key == "" {
		return c, errors.New("missing key field 'userKey' in secrets")
	}
	return c, nil
}

// cephSession is one user's access to one cluster for the length of one call. Close it.
type cephSession struct {
	ceph     *cephCommands
	cluster  string
	monitors string
	user     string
	keyFile  string
}

// open writes the key to a file only we can read: a key on a command line can be read by everybody.
func (c *cephCommands) open(clusterID string, secrets map[string]string) (*cephSession, error) {
	monitors, known := c.clusters[clusterID]
	if !known {
		return nil, fmt.Errorf("missing configuration for cluster ID %q", clusterID)
	}
	user, err := credentialsFrom(secrets)
	if err != nil {
		return nil, err
	}
	file, err := os.CreateTemp("", "howdah-lab-csi-key-")
	if err != nil {
		return nil, fmt.Errorf("make the key file: %w", err)
	}
	session := &cephSession{ceph: c, cluster: clusterID, monitors: monitors, user: user.user, keyFile: file.Name()}
	_, err = file.WriteString(user.key)
	if err = errors.Join(err, file.Close()); err != nil {
		session.Close()
		return nil, fmt.Errorf("write the key file: %w", err)
	}
	return session, nil
}

// Close removes the key file.
func (s *cephSession) Close() { _ = os.Remove(s.keyFile) }

// commandError is a command that ended badly, with what it said.
type commandError struct {
	command string
	exit    int
	said    string
}

func (e *commandError) Error() string {
	return fmt.Sprintf("%s failed with exit code %d: %s", e.command, e.exit, e.said)
}

func endedWith(err error, exit int) bool {
	var failed *commandError
	return errors.As(err, &failed) && failed.exit == exit
}

// radosMissed says whether rados failed because the object or the key is not there.
func radosMissed(err error) bool {
	return radosSaid(err, "No such key:") || radosSaid(err, "(2) No such file or directory")
}

// radosExists says whether rados failed because the object is there already.
func radosExists(err error) bool { return radosSaid(err, "(17) File exists") }

func radosSaid(err error, text string) bool {
	var failed *commandError
	return errors.As(err, &failed) && failed.command == "rados" && strings.Contains(failed.said, text)
}

// run runs one Ceph command (rbd, rados or ceph) as this session's user and returns its output.
func (s *cephSession) run(ctx context.Context, command string, arguments ...string) ([]byte, error) {
	identity := []string{"--conf", os.DevNull, "--id", s.user, "-m", s.monitors, "--keyfile=" + s.keyFile}
	return execute(ctx, command, append(identity, arguments...)...)
}

func (s *cephSession) runJSON(ctx context.Context, result any, command string, arguments ...string) error {
	output, err := s.run(ctx, command, append(arguments, "--format", "json")...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(output, result); err != nil {
		return fmt.Errorf("read the output of %s %s: %w", command, strings.Join(arguments, " "), err)
	}
	return nil
}

func execute(ctx context.Context, command string, arguments ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	var stdout, stderr bytes.Buffer
	process := exec.CommandContext(ctx, command, arguments...)
	process.Stdout, process.Stderr = &stdout, &stderr
	process.Env = append(os.Environ(), "LC_ALL=C")
	err := process.Run()
	var exited *exec.ExitError
	switch {
	case err == nil:
		return stdout.Bytes(), nil
	case ctx.Err() != nil:
		return nil, fmt.Errorf("%s: %w", command, ctx.Err())
	case errors.As(err, &exited):
		// rados reports a missing key on its standard output.
		return nil, &commandError{command, exited.ExitCode(), strings.TrimSpace(stderr.String() + stdout.String())}
	default:
		return nil, fmt.Errorf("run %s: %w", command, err)
	}
}

// poolID is a pool's number, as volume handles hold it.
func (s *cephSession) poolID(ctx context.Context, name string) (int64, error) {
	id, _, err := s.findPool(ctx, func(_ int64, known string) bool { return known == name })
	if errors.Is(err, errPoolNotFound) {
		return 0, fmt.Errorf("%w: pool (%s) in Ceph cluster", err, name)
	}
	return id, err
}

// errPoolNotFound: a volume whose pool is gone is gone too.
var errPoolNotFound = errors.New("pool not found")

func (s *cephSession) poolName(ctx context.Context, id int64) (string, error) {
	_, name, err := s.findPool(ctx, func(known int64, _ string) bool { return known == id })
	if errors.Is(err, errPoolNotFound) {
		return "", fmt.Errorf("%w: pool ID (%d) in Ceph cluster", err, id)
	}
	return name, err
}

// findPool looks among the pools that were listed last, and lists them when it is not there.
func (s *cephSession) findPool(ctx context.Context, wanted func(int64, string) bool) (int64, string, error) {
	find := func(pools map[int64]string) (int64, string, error) {
		for id, name := range pools {
			if wanted(id, name) {
				return id, name, nil
			}
		}
		return 0, "", errPoolNotFound
	}
	if known, listed := s.ceph.pools.Load(s.cluster); listed {
		if id, name, err := find(known.(map[int64]string)); err == nil {
			return id, name, nil
		}
	}
	pools, err := s.listPools(ctx)
	if err != nil {
		return 0, "", err
	}
	s.ceph.pools.Store(s.cluster, pools)
	return find(pools)
}

func (s *cephSession) listPools(ctx context.Context) (map[int64]string, error) {
	var listed []struct {
		Number int64  `json:"poolnum"`
		Name   string `json:"poolname"`
	}
	if err := s.runJSON(ctx, &listed, "ceph", "osd", "lspools"); err != nil {
		return nil, err
	}
	pools := make(map[int64]string, len(listed))
	for _, pool := range listed {
		pools[pool.Number] = pool.Name
	}
	return pools, nil
}

// imageInfo is the part of `rbd info` that we use.
type imageInfo struct {
	ID   string `json:"id"`
	Size int64  `json:"size"`
}

func (s *cephSession) imageInfo(ctx context.Context, image string) (imageInfo, error) {
	var info imageInfo
	return info, s.runJSON(ctx, &info, "rbd", "info", image)
}

// inUse says whether anybody watches the image. `rbd status` opens read-only and adds no watcher of
// its own, so unlike ceph-csi's open image there is none to subtract.
func (s *cephSession) inUse(ctx context.Context, image string) (bool, error) {
	var state struct {
		Watchers []struct {
			Address string `json:"address"`
		} `json:"watchers"`
	}
	if err := s.runJSON(ctx, &state, "rbd", "status", image); err != nil {
		return true, err
	}
	return len(state.Watchers) > 0, nil
}
