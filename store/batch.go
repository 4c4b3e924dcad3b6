package store

import (
	"fmt"

	"fsbus/bus/matrix"
)

// Batch is what one Submit stores: all of it or nothing. It belongs to the
// store from Submit until its completion and must not be changed in between.
// Fields take effect in the order in which they stand here. An empty batch is
// a barrier: its completion says that everything submitted before is decided.
type Batch struct {
	// Hosts are written over what is stored of the same names. Of two with
	// the same name the later one stays.
	Hosts []Host
	// Forget names hosts to delete. One that is not there is no error.
	Forget []matrix.ServerName
	// Outbox is what to do with the outbox, in this order. The Result of each is
	// set when the completion is called with nil.
	Outbox []OutboxOp
	// Answers are written over what is stored under the same keys. Of two with the
	// same key the later one stays. One that finds no room is not stored.
	Answers []Answer
	// DropAnswers are the keys of answers to delete. One that is not there is no
	// error.
	DropAnswers [][32]byte
	// Keys are written over what is stored of the same Via and Server. Of two with
	// the same the later one stays.
	Keys []ServerKeys
	// Inbound are written over what is stored of the same origins and ids. Of two with
	// the same the later one stays. One that finds no room is not stored.
	Inbound []InboundTxn
}

// What a batch and a slice element cost besides their strings, rounded up for
// 64-bit: a Batch with its place in the queue, a Host, a string header, an interface,
// an Answer, the key of one, a ServerKeys, an InboundTxn, an InboundPDU.
const (
	batchBytes      = 192
	hostBytes       = 96
	nameBytes       = 16
	opBytes         = 16
	answerBytes     = 112
	answerKeyBytes  = 32
	keysBytes       = 80
	inboundBytes    = 104
	inboundPDUBytes = 48
)

// size is about how many bytes of memory b holds.
func (b *Batch) size() int64 {
	n := int64(batchBytes)
	for i := range b.Hosts {
		n += hostBytes + int64(len(b.Hosts[i].Name)) + int64(len(b.Hosts[i].Error))
	}
	for _, name := range b.Forget {
		n += nameBytes + int64(len(name))
	}
	for _, op := range b.Outbox {
		n += opBytes + op.size()
	}
	for i := range b.Answers {
		n += answerBytes + b.Answers[i].size()
	}
	n += answerKeyBytes * int64(len(b.DropAnswers))
	for i := range b.Keys {
		k := &b.Keys[i]
		n += keysBytes + int64(len(k.Via)) + int64(len(k.Server)) + int64(len(k.Object))
	}
	for i := range b.Inbound {
		n += inboundBytes + b.Inbound[i].size()
	}
	return n
}

// apply writes b inside the open transaction and returns how many rows changed.
func (w *writer) apply(b *Batch) (int64, error) {
	var rows int64
	for i := range b.Hosts {
		n, err := w.hosts.put(&b.Hosts[i])
		if err != nil {
			return 0, classify(fmt.Sprintf("write host %q", b.Hosts[i].Name), w.path, err)
		}
		rows += n
	}
	for _, name := range b.Forget {
		n, err := w.hosts.delete(name)
		if err != nil {
			return 0, classify(fmt.Sprintf("forget host %q", name), w.path, err)
		}
		rows += n
	}
	for _, op := range b.Outbox {
		n, err := op.apply(w.outbox)
		if err != nil {
			return 0, classify(op.String(), w.path, err)
		}
		rows += n
	}
	for i := range b.Answers {
		n, err := w.answers.put(&b.Answers[i])
		if err != nil {
			return 0, classify("write answer", w.path, err)
		}
		rows += n
	}
	for i := range b.DropAnswers {
		n, err := w.answers.drop(&b.DropAnswers[i])
		if err != nil {
			return 0, classify("drop answer", w.path, err)
		}
		rows += n
	}
	for i := range b.Keys {
		k := &b.Keys[i]
		n, err := w.keys.put(k)
		if err != nil {
			return 0, classify(fmt.Sprintf("write keys of %q by way of %q", k.Server, k.Via), w.path, err)
		}
		rows += n
	}
	for i := range b.Inbound {
		x := &b.Inbound[i]
		n, err := w.inbound.put(x)
		if err != nil {
			return 0, classify(fmt.Sprintf("write transaction of %q", x.Origin), w.path, err)
		}
		rows += n
	}
	return rows, nil
}
