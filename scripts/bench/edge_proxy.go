package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"fsbus/scripts/rig"
)

var edgeProxyFlag = flag.String("proxy", "", "edge-throughput: the `command` that is nginx or caddy, words separated by spaces (default: whichever of the two is in PATH)")

// plainProxy is a reverse proxy that checks nothing and stores nothing, as it
// stands before a homeserver that has no fsbus: TLS outside, HTTP/1.1 with
// connections that are kept inside.
type plainProxy struct {
	*rig.Process
	name   string
	listen string
}

// findProxy returns the command of a reverse proxy and which one it is. There need
// not be one.
func findProxy() (command []string, name string, ok bool) {
	command = strings.Fields(*edgeProxyFlag)
	if len(command) == 0 {
		for _, name := range []string{"nginx", "caddy"} {
			if path, err := exec.LookPath(name); err == nil {
				command = []string{path}
				break
			}
		}
	}
	if len(command) == 0 {
		return nil, "", false
	}
	name = "nginx"
	if strings.Contains(filepath.Base(command[0]), "caddy") {
		name = "caddy"
	}
	return command, name, true
}

// nginxConfig: the paths that Debian compiles in are root's.
const nginxConfig = `daemon off;
worker_processes auto;
error_log stderr error;
pid %[1]s/nginx.pid;
events { worker_connections 4096; }
http {
	access_log off;
	client_body_temp_path %[1]s/body;
	proxy_temp_path %[1]s/proxy;
	fastcgi_temp_path %[1]s/fastcgi;
	uwsgi_temp_path %[1]s/uwsgi;
	scgi_temp_path %[1]s/scgi;
	keepalive_requests 1000000;
	client_max_body_size 50m;
	upstream homeserver {
		server %[3]s;
		keepalive 64;
		keepalive_requests 1000000;
	}
	server {
		listen %[2]s ssl http2 backlog=4096;
		ssl_certificate %[4]s;
		ssl_certificate_key %[5]s;
		location / {
			proxy_pass http://homeserver;
			proxy_http_version 1.1;
			proxy_set_header Connection "";
			proxy_set_header Host $host;
			proxy_set_header X-Forwarded-For $remote_addr;
			proxy_set_header X-Forwarded-Proto $scheme;
		}
	}
}
`

const caddyConfig = `{
	admin off
	auto_https off
	persist_config off
	storage file_system %[1]s/storage
	log {
		level ERROR
	}
}
https://%[6]s:%[7]s {
	bind 127.0.0.1
	tls %[4]s %[5]s
	reverse_proxy %[3]s
}
`

// startPlain starts a reverse proxy before the field's stub.
func (b *bench) startPlain(ctx context.Context, f *edgeField, command []string, name string) (*plainProxy, error) {
	dir, err := b.folder()
	if err != nil {
		return nil, err
	}
	p := &plainProxy{name: name}
	if p.listen, err = rig.FreeAddress(); err != nil {
		return nil, err
	}
	_, port, _ := strings.Cut(p.listen, ":")
	text, args := nginxConfig, []string{"-p", dir, "-e", "stderr", "-c"}
	if name == "caddy" {
		text, args = caddyConfig, []string{"run", "--adapter", "caddyfile", "--config"}
	}
	path := filepath.Join(dir, "config")
	all := []any{dir, p.listen, f.stub.Address, f.cert.CertFile, f.cert.KeyFile, f.From.Name, port}
	if name == "nginx" {
		all = all[:5]
	}
	if err := os.WriteFile(path, fmt.Appendf(nil, text, all...), 0o600); err != nil {
		return nil, err
	}
	words := append(append(append([]string{}, command...), args...), path)
	if p.Process, err = rig.StartProcess(filepath.Join(dir, "log"), words...); err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(20 * time.Second); !listens("tcp", p.listen); {
		if time.Now().After(deadline) {
			p.Kill()
			return nil, fmt.Errorf("%s does not listen", name)
		}
		select {
		case <-p.Done():
			return nil, p.Running()
		case <-ctx.Done():
			p.Kill()
			return nil, ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	return p, nil
}

func (p *plainProxy) target(f *edgeField) rig.Target {
	return rig.Target{Address: p.listen, Roots: f.cert.Roots}
}
