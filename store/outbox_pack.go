package store

import (
	"errors"
	"fmt"

	"fsbus/bus/matrix"
)

// Pack makes the next transaction for a destination and freezes what is in it
// until Settle. If there is one that is not settled, it is that again, with the
// same id and the same bytes, also after a restart.
//
// The bytes are not stored. They come from the frozen items, which nothing changes,
// in their order, and from the time and size at which they were first packed,
// which are stored. A matrix.Builder of a later fsbus may write them in another
// way, or find that not all fit any more; then what does not is not frozen any
// more. Receivers know a transaction by its id.
//
// Items that have expired are deleted. One that is damaged, or not of the form that its
// kind asks for, is set aside.
type Pack struct {
	Destination matrix.ServerName
	// NewID is the id if it is a new transaction, 1 to MaxTxnID bytes.
	NewID  string
	Now    int64
	Origin matrix.ServerName
	// MaxBytes is the size that a new transaction should not exceed, see
	// matrix.NewBuilder.
	MaxBytes int

	Result PackResult
}

// PackResult is a transaction. The zero value: there is nothing to send.
type PackResult struct {
	ID       string
	Body     []byte // canonical, for matrix.SignRequest
	At       int64  // when it was first packed: its origin_server_ts
	Again    bool   // it was packed before
	PDUs     int
	EDUs     int
	Kinds    KindTotals // what is in it
	Oldest   int64      // when the oldest of it was accepted
	Items    []int64    // their numbers, in the order of packing
	Expired  KindTotals // deleted
	SetAside int
	Damaged  int // those of SetAside that are damaged in the file
	// Destination is what is pending afterwards, the above included.
	Destination Destination
}

// String says what p does, for errors.
func (p *Pack) String() string { return fmt.Sprintf("pack for %q", p.Destination) }

func (p *Pack) size() int64 { return int64(512 + len(p.Destination) + len(p.NewID) + len(p.Origin)) }

// maxTrim is how many items an operation deletes beside its purpose, or for it if
// that is deleting: it bounds how long other batches wait.
const maxTrim = 1000

func (p *Pack) apply(o *outbox) (int64, error) {
	p.Result = PackResult{}
	if len(p.NewID) == 0 || len(p.NewID) > MaxTxnID || p.MaxBytes <= 0 {
		return 0, fmt.Errorf("%w: a transaction id of %d bytes, at most %d bytes in all", ErrInvalid, len(p.NewID), p.MaxBytes)
	}
	d, err := o.dest(p.Destination)
	if d == nil || err != nil {
		return 0, err
	}
	var rows int64
	changed := false
	for {
		w := packing{outbox: o, dest: d, result: &p.Result}
		fresh := len(d.parts) == 0
		if fresh {
			w.part = part{Max: p.MaxBytes}
		} else {
			w.part = d.parts[0]
		}
		again := w.part.ID != ""
		if !again {
			w.part.ID, w.part.At = p.NewID, p.Now
			if w.part.Max == 0 {
				w.part.Max = p.MaxBytes
			}
		}
		b := matrix.NewBuilder(p.Origin, w.part.Max)
		if fresh {
			err = w.takeNew(b)
		} else {
			err = w.takeFrozen(b)
		}
		if err != nil {
			return 0, err
		}
		n, err := w.clear()
		if err != nil {
			return 0, err
		}
		rows += n
		changed = changed || n > 0
		if b.Empty() && fresh {
			if d.Kinds != (KindTotals{}) {
				// Either more has expired than goes in one step, or the totals are wrong,
				// after a shell or a .recover: then this would come again for ever.
				d.uncounted, changed = true, true
			}
			break
		}
		if b.Empty() {
			d.parts, changed = d.parts[1:], true // nothing of it could be packed
			continue
		}
		if fresh {
			d.parts = []part{w.packed}
		} else {
			// Settle deletes what stands here, so it must be what was sent.
			changed = changed || w.packed.totals() != d.parts[0].totals()
			d.parts[0] = w.packed
		}
		changed = changed || !again
		p.Result.Again = again
		p.Result.ID, p.Result.At = w.packed.ID, w.packed.At
		p.Result.PDUs, p.Result.EDUs = b.Counts()
		p.Result.Kinds = w.packed.totals()
		p.Result.Body = b.Finish(w.packed.At)
		break
	}
	if changed {
		if err := o.save(d); err != nil {
			return 0, err
		}
		rows++
	}
	p.Result.Destination = d.Destination
	return rows, nil
}

// packing is one attempt to pack.
type packing struct {
	*outbox
	dest   *dest
	result *PackResult
	part   part // what to pack, or only its id, time and size
	packed part // what was packed
	gone   []queued
	bad    []queued
}

// takeNew fills b with what stands first in each lane.
func (w *packing) takeNew(b *matrix.Builder) error {
	w.packed = w.part
	for l := matrix.Lane(1); l <= matrix.NumLanes; l++ {
		if w.dest.Kinds.lane(l) == 0 {
			continue
		}
		if err := w.each(w.dest, l, 0, maxSeq, func(it *queued) error {
			if it.expired(w.part.At) {
				w.gone = append(w.gone, queued{lane: it.lane, seq: it.seq, kind: it.kind, accepted: it.accepted, size: it.size})
				if len(w.gone) >= maxTrim {
					return errStop
				}
				return nil
			}
			return w.take(b, it)
		}); err != nil {
			return err
		}
	}
	return nil
}

// maxSeq is greater than any number of an item.
const maxSeq = 1<<63 - 1

// takeFrozen fills b with what is frozen.
func (w *packing) takeFrozen(b *matrix.Builder) error {
	w.packed = part{ID: w.part.ID, At: w.part.At, Max: w.part.Max, Refused: w.part.Refused}
	for _, s := range w.part.Spans {
		if err := w.each(w.dest, s.Lane, s.First, s.Last, func(it *queued) error { return w.take(b, it) }); err != nil {
			return err
		}
	}
	return nil
}

func (w *packing) take(b *matrix.Builder, it *queued) error {
	if it.damage != "" {
		return w.refuse(it)
	}
	fits, err := b.Add(it.kind, it.payload, w.part.At-it.accepted)
	switch {
	case errors.Is(err, matrix.ErrItem):
		return w.refuse(it)
	case err != nil:
		return err
	case !fits:
		return errStop
	}
	w.packed.add(it)
	w.result.Items = append(w.result.Items, it.seq)
	if w.result.Oldest == 0 || it.accepted < w.result.Oldest {
		w.result.Oldest = it.accepted
	}
	return nil
}

// refuse notes an item that cannot be packed.
func (w *packing) refuse(it *queued) error {
	w.bad = append(w.bad, *it)
	if len(w.bad) >= maxTrim {
		return errStop
	}
	return nil
}

// clear deletes what has expired and sets aside what cannot be packed.
func (w *packing) clear() (rows int64, err error) {
	for i := range w.gone {
		it := &w.gone[i]
		if err := w.drop(w.dest, it); err != nil {
			return 0, err
		}
		w.result.Expired.add(it.kind, 1, it.size)
	}
	for i := range w.bad {
		it, reason := &w.bad[i], "not of the form that its kind asks for"
		if it.damage != "" {
			reason = string(it.damage)
			w.result.Damaged++
		}
		if _, err := w.setAside(w.dest, it, w.part.At, reason); err != nil {
			return 0, err
		}
		w.result.SetAside++
	}
	rows = int64(len(w.gone) + len(w.bad))
	if rows > 0 {
		err = w.findOldest(w.dest)
	}
	return rows, err
}

// Outcome is how a packed transaction ended. There is none for failures that may
// pass: the batch stays frozen and is packed again.
type Outcome uint8

const (
	// Delivered: the destination has answered 200. The items are deleted.
	Delivered Outcome = 1 + iota
	// Bisect: the destination refuses the batch, and will go on to. Its items
	// are divided into two halves, which are packed one after the other, under
	// new ids. A single item is set aside.
	Bisect
	// Thaw: nothing of the batch can have reached the destination, for no
	// connection came about at any attempt, by this process or one before
	// (PackResult.Again). Its items wait again as if they had never been packed:
	// newer ones that have come meanwhile replace them or merge with them, by the
	// rules of their kinds, the others keep their places, and what is packed next
	// has a new id.
	//
	// A half of a batch that was refused is not thawed, nor is one while the other
	// is still to be tried: the destination has seen what is in it, and to divide
	// it would have to begin anew.
	Thaw
)

// Settle ends a transaction that was packed. If it is not the one that is frozen
// now, say because this is done for the second time, nothing changes.
type Settle struct {
	Destination matrix.ServerName
	TxnID       string // PackResult.ID
	Outcome     Outcome
	Now         int64
	// Reason says why the destination refuses it, for Aside.Reason.
	Reason string

	Result SettleResult
}

// SettleResult says what came of it.
type SettleResult struct {
	Found     bool       // it was the frozen one
	Delivered KindTotals // deleted
	Thawed    bool       // nothing is frozen any more
	Merged    int        // items that newer ones took the place of when they thawed
	// SetAside is the item that was set aside, nil if none was.
	SetAside *Aside
	// Destination is what is pending afterwards.
	Destination Destination
}

// String says what s does, for errors.
func (s *Settle) String() string { return fmt.Sprintf("settle for %q", s.Destination) }

func (s *Settle) size() int64 {
	return int64(448 + len(s.Destination) + len(s.TxnID) + len(s.Reason))
}

func (s *Settle) apply(o *outbox) (int64, error) {
	s.Result = SettleResult{}
	if s.Outcome < Delivered || s.Outcome > Thaw {
		return 0, fmt.Errorf("%w: outcome %d", ErrInvalid, s.Outcome)
	}
	d, err := o.dest(s.Destination)
	if d == nil || err != nil {
		return 0, err
	}
	if s.TxnID == "" || len(d.parts) == 0 || d.parts[0].ID != s.TxnID {
		s.Result.Destination = d.Destination
		return 0, nil
	}
	s.Result.Found = true
	var rows int64
	switch s.Outcome {
	case Delivered:
		rows, err = s.delivered(o, d)
	case Bisect:
		rows, err = s.bisect(o, d)
	case Thaw:
		if len(d.parts) > 1 || d.parts[0].Refused {
			s.Result.Destination = d.Destination
			return 0, nil
		}
		rows, err = s.thaw(o, d)
	}
	if err == nil {
		err = o.save(d)
	}
	s.Result.Destination = d.Destination
	return rows + 1, err
}

func (s *Settle) delivered(o *outbox, d *dest) (rows int64, err error) {
	p := d.parts[0]
	d.parts = d.parts[1:]
	for _, sp := range p.Spans {
		n, err := o.removeSpan.exec(d.id, int64(sp.Lane), sp.First, sp.Last)
		if err != nil {
			return 0, err
		}
		rows += n
	}
	s.Result.Delivered = p.totals()
	for k, t := range s.Result.Delivered {
		d.Kinds.add(matrix.Kind(k), -t.Items, -t.Bytes)
	}
	if rows != s.Result.Delivered.Sum().Items {
		// Somebody else has deleted some.
		if err := o.count(d); err != nil {
			return 0, err
		}
	}
	return rows, o.findOldest(d)
}

func (s *Settle) bisect(o *outbox, d *dest) (rows int64, err error) {
	p := d.parts[0]
	n := p.totals()
	half := n.Sum().Items / 2
	halves := [2]part{{Refused: true}, {Refused: true}}
	var last queued
	for _, sp := range p.Spans {
		if err := o.each(d, sp.Lane, sp.First, sp.Last, func(it *queued) error {
			i := 0
			if half == 0 {
				i = 1
			} else {
				half--
			}
			halves[i].add(it)
			last = *it
			return nil
		}); err != nil {
			return 0, err
		}
	}
	d.parts = d.parts[1:]
	if len(halves[0].Spans) > 0 {
		d.parts = append(halves[:], d.parts...)
		return 0, nil
	}
	if last.seq == 0 {
		return 0, o.count(d) // somebody else has deleted it
	}
	aside, err := o.setAside(d, &last, s.Now, s.Reason)
	if err != nil {
		return 0, err
	}
	s.Result.SetAside = aside
	return 2, o.findOldest(d)
}

// thaw lets the items of the batch wait again. Of a lane in which nothing else
// waits none is read.
func (s *Settle) thaw(o *outbox, d *dest) (rows int64, err error) {
	m := merger{outbox: o, dest: d}
	p := d.parts[0]
	frozen := p.totals()
	for _, sp := range p.Spans {
		if d.Kinds.lane(sp.Lane) == frozen.lane(sp.Lane) {
			continue
		}
		var list []queued
		if err := o.each(d, sp.Lane, sp.First, sp.Last, func(it *queued) error {
			switch it.kind.Merge() {
			case matrix.MergeReplace, matrix.MergeFields, matrix.MergeChain:
				if it.key != nil {
					it.payload = nil // a batch of them is large
					list = append(list, *it)
				}
			}
			return nil
		}); err != nil {
			return 0, err
		}
		for i := range list {
			gone, err := m.thaw(&list[i])
			if err != nil {
				return 0, err
			}
			if gone {
				s.Result.Merged++
			}
		}
	}
	d.parts = nil
	s.Result.Thawed = true
	if s.Result.Merged > 0 {
		err = o.findOldest(d)
	}
	return m.rows, err
}
