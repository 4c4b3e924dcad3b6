package netx

import (
	"context"
	"encoding/binary"
	"net"
)

// Some home routers' name servers answer FORMERR or NOTIMP to a question with EDNS0, or
// nothing at all (RFC 6891 7). Go's resolver adds it to each question, and has no switch
// for one resolver alone. So there is a second one, whose connections take it out again.

// withoutEDNS returns a resolver that asks the system's name servers without EDNS0.
func withoutEDNS() *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		var d net.Dialer
		conn, err := d.DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		if packets, ok := conn.(*net.UDPConn); ok {
			return plainPackets{packets}, nil
		}
		return plainStream{conn}, nil
	}}
}

// plainPackets is a connection to a name server by UDP. That it is a net.PacketConn tells
// the resolver so.
type plainPackets struct{ *net.UDPConn }

func (c plainPackets) Write(question []byte) (int, error) {
	if _, err := c.UDPConn.Write(plainQuestion(question)); err != nil {
		return 0, err
	}
	return len(question), nil
}

// plainStream is one by TCP, where the length of a question stands before it.
type plainStream struct{ net.Conn }

func (c plainStream) Write(b []byte) (int, error) {
	if len(b) < 2 {
		return c.Conn.Write(b)
	}
	q := plainQuestion(b[2:])
	out := binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(q)), uint16(len(q)))
	if _, err := c.Conn.Write(append(out, q...)); err != nil {
		return 0, err
	}
	return len(b), nil
}

const (
	dnsHeader = 12 // bytes; the last two say how many additional records there are
	optRecord = 11 // of a record OPT without options: a root name, its type, and eight more
)

// plainQuestion returns a question without the record OPT with which EDNS0 is asked for,
// where that is its only additional record and stands last, as Go's resolver has it.
func plainQuestion(q []byte) []byte {
	n := len(q)
	if n < dnsHeader+optRecord || binary.BigEndian.Uint16(q[10:]) != 1 {
		return q
	}
	if opt := q[n-optRecord:]; opt[0] != 0 || binary.BigEndian.Uint16(opt[1:]) != 41 || binary.BigEndian.Uint16(opt[9:]) != 0 {
		return q
	}
	plain := append([]byte(nil), q[:n-optRecord]...)
	plain[10], plain[11] = 0, 0
	return plain
}
