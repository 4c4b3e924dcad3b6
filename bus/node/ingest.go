package node

import (
	"crypto/sha256"

	"fsbus/bus"
	"fsbus/bus/matrix"
	"fsbus/netx"
)

// ingest hands a parked request to the core. It runs on the connection's
// goroutine.
func (n *Node) ingest(in *netx.Inbound) {
	if in.Own {
		n.handover.serve(in)
		return
	}
	ep := matrix.Match(in.Method, in.Target)
	n.endpoints.count(ep.Name)
	class := ep.Class
	own := n.notary != nil && in.Destination == n.notary.name
	if ep.Name == "send" && !own {
		if n.offer(in) {
			return
		}
		class = sendClass(in)
	}
	a := bus.Arrived{
		Req:      bus.ReqID(in.ID),
		Dest:     in.Destination,
		Endpoint: ep,
		Class:    class,
		Key:      requestKey(in),
		Received: n.clock.At(in.Received),
		Room:     matrix.RoomID(ep, in.Target),
	}
	switch {
	case own:
		n.forNotary(in, a)
		return
	case ep.Kind == matrix.AnswerKeyQuery && n.queryKeys(in, a, false):
		return
	case ep.Kind == matrix.AnswerProfile:
		var whole string
		if a.Field, whole = matrix.ProfileField(in.Target); whole != "" {
			a.Whole = keyOf(in.Destination, in.Method, whole, in.Sum)
		}
	}
	n.loop.Post(event{in: in, Event: a})
}

// sendClass looks into a transaction. One that is too large to be in memory
// holds more than typing.
func sendClass(in *netx.Inbound) matrix.Class {
	if in.Body == nil {
		return matrix.ClassPresence
	}
	body, ok := in.Body.Bytes()
	if !ok {
		return matrix.ClassEvent
	}
	return matrix.SendClass(body)
}

// requestKey tells equal requests apart from others. The homeserver signs the
// same request in the same way, so nothing else distinguishes them.
func requestKey(in *netx.Inbound) bus.Key {
	return keyOf(in.Destination, in.Method, in.Target, in.Sum)
}

func keyOf(dest matrix.ServerName, method, target string, sum [sha256.Size]byte) bus.Key {
	h := sha256.New()
	for _, s := range []string{string(dest), method, target} {
		h.Write([]byte(s))
		h.Write([]byte{0})
	}
	h.Write(sum[:])
	return bus.Key(h.Sum(nil))
}

// gone passes on that the homeserver no longer waits.
func (n *Node) gone(in *netx.Inbound) {
	n.loop.Post(event{Event: bus.Gone{Req: bus.ReqID(in.ID)}})
}
