package node

import (
	"encoding/base64"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// unitSecret is the file that scripts/fsbus.service passes on as the secret.
const unitSecret = "/etc/fsbus/secret"

// SynapseConfig returns the lines for homeserver.yaml that make Synapse send
// its federation requests to the first address of Front.Listen, take those of others
// from the edge, and ask the bus for keys if it is a notary. For that the notary's key
// is made if it is missing; an error is one of that key. A secret that is in the
// configuration itself is not shown.
func (c *Config) SynapseConfig() (string, error) {
	var b strings.Builder
	b.WriteString("# For homeserver.yaml of Synapse 1.89 or newer. An instance_map that is there\n" +
		"# already gets the one line more.\n" +
		"instance_map:\n")
	if path, ok := strings.CutPrefix(c.Front.Listen[0], "unix:"); ok {
		fmt.Fprintf(&b, "  fsbus: {path: %s}\n", yamlText(path))
	} else {
		host, port, _ := net.SplitHostPort(c.Front.Listen[0])
		if addr, _ := netip.ParseAddr(host); host == "" || addr.IsUnspecified() {
			host = "127.0.0.1" // or, from another machine, this one's address
		}
		fmt.Fprintf(&b, "  fsbus: {host: %s, port: %s}\n", yamlText(host), port)
	}
	b.WriteString("outbound_federation_restricted_to: [fsbus]\n")
	if strings.HasPrefix(c.Front.SecretPath, credentials) {
		fmt.Fprintf(&b, "# The file that LoadCredential in the systemd unit of fsbus names: the copy that\n"+
			"# secret_path names is for fsbus alone. Synapse's user must be able to read it.\n"+
			"# Before Synapse 1.126: worker_replication_secret, with the text in that file.\n"+
			"worker_replication_secret_path: %s\n", yamlText(unitSecret))
	} else if c.Front.SecretPath != "" {
		fmt.Fprintf(&b, "# Before Synapse 1.126: worker_replication_secret, with the text in that file.\n"+
			"worker_replication_secret_path: %s\n", yamlText(c.Front.SecretPath))
	} else {
		b.WriteString("# worker_replication_secret: the text that is secret in [front] of the\n" +
			"# configuration of fsbus, which is not shown here.\n")
	}
	if c.hasOutbox() {
		b.WriteString("# With the module (fsbus synapse-module -where) Synapse gives each event once:\n" +
			"#modules:\n#  - {module: fsbus_handover.Fsbus, config: {}}\n")
	}
	c.edgeListener(&b)
	if !c.Keys.Notary {
		return b.String(), nil
	}
	key, made, err := findNotaryKey(c)
	if err != nil {
		return "", err
	}
	b.WriteString("# fsbus fetches the keys of other servers itself. This takes the place of a\n" +
		"# trusted_key_servers that is there already.\n")
	if made {
		fmt.Fprintf(&b, "# The key of the notary was made just now: %s\n", yamlText(c.notaryKeyPath()))
	}
	fmt.Fprintf(&b, "trusted_key_servers:\n"+
		"  - server_name: %s\n"+
		"    verify_keys:\n"+
		"      %s: %s\n", yamlText(string(c.Keys.NotaryName)), yamlText(key.ID()), yamlText(base64.RawStdEncoding.EncodeToString(key.Public())))
	return b.String(), nil
}

// edgeListener adds the listener to which the edge takes what comes from outside.
func (c *Config) edgeListener(b *strings.Builder) {
	if !c.hasEdge() {
		return
	}
	b.WriteString("# Other servers connect to fsbus. Of the listeners, the one for federation is\n" +
		"# this; no other one has federation, and nobody from outside can reach it.\n" +
		"#  - type: http\n")
	if path, ok := strings.CutPrefix(c.Edge.Upstream, "unix:"); ok {
		fmt.Fprintf(b, "#    path: %s\n", yamlText(path))
	} else {
		host, port, err := net.SplitHostPort(strings.TrimSuffix(strings.TrimPrefix(c.Edge.Upstream, "http://"), "/"))
		if err != nil {
			host, port = "127.0.0.1", "80" // it names no port
		}
		fmt.Fprintf(b, "#    bind_addresses: [%s]\n#    port: %s\n", yamlText(host), port)
	}
	names := "federation"
	if c.Edge.PassClient {
		names = "client, federation"
	}
	fmt.Fprintf(b, "#    x_forwarded: true\n#    resources: [{names: [%s]}]\n", names)
	if !c.Edge.PassClient {
		b.WriteString("# If clients come to that port, too, leave it its other names, or they are cut off:\n" +
			"# names: [client, federation].\n")
	}
}

// yamlText returns s in double quotes. What Go escapes YAML escapes alike
// (YAML 1.2.2, 5.7).
func yamlText(s string) string { return strconv.Quote(s) }
