package netx

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
)

// ErrReaderClosed is returned by a Reader after its Close.
var ErrReaderClosed = errors.New("netx: read of a closed body reader")

// A Body is the content of one request or answer: written once, by one
// goroutine, and read by any number of Readers, each from the first byte on,
// while it is still being written or later.
//
// It is counted by reference. New gives the creator one reference; Retain adds
// one; Release takes one away, and the last frees memory and file. A Reader
// holds a reference of its own until it is closed. Any use after the last
// Release panics.
type Body struct {
	spool *Spool

	mu   sync.Mutex
	more sync.Cond // size, done or a Reader's closed has changed; L is &mu
	mem  []byte    // all bytes so far, while file is nil; never changed once written
	file spoolFile // set once, when the body moves to disk
	size int64
	refs int
	done bool
	err  error // with done: why the body is incomplete
}

// New returns an empty body. It costs no budget until bytes are written.
func (s *Spool) New() *Body {
	b := &Body{spool: s, refs: 1}
	b.more.L = &b.mu
	return b
}

// lock locks b and checks that it is alive.
func (b *Body) lock(op string) {
	b.mu.Lock()
	if b.refs <= 0 {
		defer b.mu.Unlock()
		panic(fmt.Sprintf("netx: Body.%s after the last Release (%d references, %d bytes)", op, b.refs, b.size))
	}
}

// Write appends p, all of it or nothing. Its error is ErrSpoolFull when there
// is no room, or what the file system said. After an error the body is as it
// was before, and the write may be repeated. Write must not be called
// concurrently with itself or CloseWrite, nor after CloseWrite.
func (b *Body) Write(p []byte) (int, error) {
	b.lock("Write")
	if b.done {
		defer b.mu.Unlock()
		panic(fmt.Sprintf("netx: Body.Write after CloseWrite (%d bytes)", b.size))
	}
	b.mu.Unlock()

	// Only this goroutine changes mem, file and size, so it may look at them
	// without the lock.
	if b.file == nil && b.writeMemory(p) {
		return len(p), nil
	}
	if err := b.writeDisk(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// writeMemory appends p in memory. It reports false, and has changed nothing,
// when that would exceed the inline size or the memory budget.
func (b *Body) writeMemory(p []byte) bool {
	have, need := int64(cap(b.mem)), b.size+int64(len(p))
	if need > b.spool.inline {
		return false
	}
	mem := b.mem
	if need > have {
		// The first write is taken as it comes, since most bodies arrive in
		// one piece; then the buffer doubles. A tight budget gets what is
		// needed and no more.
		size := need
		if have > 0 {
			size = max(need, min(2*have, b.spool.inline))
		}
		if !b.spool.take(size-have, 0, 0) {
			size = need
			if !b.spool.take(size-have, 0, 0) {
				return false
			}
		}
		mem = make([]byte, b.size, size)
		copy(mem, b.mem)
	}
	// Readers may be copying the bytes before size at this moment; those
	// behind it belong to the writer.
	mem = append(mem, p...)

	b.mu.Lock()
	b.mem, b.size = mem, need
	b.mu.Unlock()
	b.more.Broadcast()
	return true
}

// writeDisk appends p to the file. The first time it makes the file and moves
// there what was in memory.
func (b *Body) writeDisk(p []byte) error {
	file, grow, files := b.file, int64(len(p)), 0
	if file == nil {
		grow, files = grow+b.size, 1
	}
	if !b.spool.take(0, grow, files) {
		return b.spool.full()
	}
	var err error
	if file == nil {
		file, err = b.spool.open(b.spool.dir)
		if err == nil && b.size > 0 {
			_, err = file.WriteAt(b.mem, 0)
		}
	}
	if err == nil {
		_, err = file.WriteAt(p, b.size)
	}
	if err != nil {
		if b.file == nil && file != nil {
			_ = file.Close() // what it holds is still in memory
		}
		b.spool.give(0, grow, files)
		return b.diskError(err)
	}

	b.mu.Lock()
	held := int64(cap(b.mem))
	b.file, b.mem = file, nil
	b.size += int64(len(p))
	b.mu.Unlock()
	b.more.Broadcast()
	if held > 0 {
		b.spool.give(held, 0, 0)
	}
	return nil
}

// diskError makes a full disk, or a quota, look like a used-up budget.
func (b *Body) diskError(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", b.spool.full(), err)
	}
	return fmt.Errorf("spool: write: %w", err)
}

// ReadFrom is Fill without makeRoom. It implements io.ReaderFrom, so that io.Copy
// needs no buffer of its own.
func (b *Body) ReadFrom(r io.Reader) (int64, error) { return b.Fill(r, nil) }

// Fill appends what r yields until io.EOF, each piece as it comes, so that Readers
// see it at once. It does not call CloseWrite. Its error is r's or that of Write; what
// was read and could not be written is lost. If the spool is full and makeRoom is not
// nil, that is called, and the write tried again as long as it reports true.
func (b *Body) Fill(r io.Reader, makeRoom func() bool) (int64, error) {
	buf := getCopyBuf()
	defer putCopyBuf(buf)
	var total int64
	for {
		n, err := r.Read(buf[:])
		for total > gatherAfter && err == nil && n < len(buf) {
			var more int
			more, err = r.Read(buf[n:])
			n += more
		}
		if n > 0 {
			_, werr := b.Write(buf[:n])
			for makeRoom != nil && errors.Is(werr, ErrSpoolFull) && makeRoom() {
				_, werr = b.Write(buf[:n])
			}
			if werr != nil {
				return total, werr
			}
			total += int64(n)
		}
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// CloseWrite ends the body. With nil it is complete, and Readers get io.EOF
// after its last byte; otherwise they get err there. io.EOF as err would make
// a cut body look complete, so it counts as io.ErrUnexpectedEOF. Only the
// first call has an effect.
func (b *Body) CloseWrite(err error) {
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	b.lock("CloseWrite")
	if b.done {
		b.mu.Unlock()
		return
	}
	b.done, b.err = true, err
	// A body may wait for hours; what doubling left over is given back when
	// it is more than an eighth.
	var spare int64
	if extra := cap(b.mem) - len(b.mem); extra > len(b.mem)/8 {
		b.mem = append(make([]byte, 0, len(b.mem)), b.mem...)
		spare = int64(extra)
	}
	b.mu.Unlock()
	b.more.Broadcast()
	if spare > 0 {
		b.spool.give(spare, 0, 0)
	}
}

// Size returns the number of bytes written so far.
func (b *Body) Size() int64 {
	b.lock("Size")
	defer b.mu.Unlock()
	return b.size
}

// Complete reports whether CloseWrite(nil) was called.
func (b *Body) Complete() bool {
	b.lock("Complete")
	defer b.mu.Unlock()
	return b.done && b.err == nil
}

// Bytes returns the whole body if it is complete and in memory. The slice must
// not be changed, and is accounted for only as long as a reference is held.
func (b *Body) Bytes() ([]byte, bool) {
	b.lock("Bytes")
	defer b.mu.Unlock()
	if !b.done || b.err != nil || b.file != nil {
		return nil, false
	}
	return b.mem, true
}

// Retain adds a reference.
func (b *Body) Retain() {
	b.lock("Retain")
	defer b.mu.Unlock()
	b.refs++
}

// Release gives up a reference. The last one frees the body; with a large one
// on disk that takes as long as the file system needs to free its blocks.
func (b *Body) Release() {
	b.lock("Release")
	b.refs--
	if b.refs > 0 {
		b.mu.Unlock()
		return
	}
	mem, file, size := int64(cap(b.mem)), b.file, b.size
	b.mem, b.file = nil, nil
	b.mu.Unlock()
	if file == nil {
		b.spool.give(mem, 0, 0)
		return
	}
	// An unlinked file has nothing to lose, so an error of Close matters to nobody.
	_ = file.Close()
	b.spool.give(0, size, 1)
}

// Reader returns a new Reader at the first byte. It must be closed.
func (b *Body) Reader() *Reader {
	b.lock("Reader")
	defer b.mu.Unlock()
	b.refs++
	return &Reader{body: b}
}

// A Reader reads a Body from its first byte and waits for bytes that are not
// yet written. Read and WriteTo are for one goroutine; Close may be called by
// any.
type Reader struct {
	body   *Body
	off    int64
	closed bool // guarded by body.mu
}

// whole returns the whole body if it is complete, in memory, and nothing of it
// has been read yet.
func (r *Reader) whole() ([]byte, bool) {
	if r.off > 0 {
		return nil, false
	}
	return r.body.Bytes()
}

// Read blocks until there are bytes, the body ends, or the Reader is closed.
// Its error is io.EOF at the end of a complete body, what CloseWrite was given
// at the end of an incomplete one, or ErrReaderClosed.
func (r *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	mem, file, n, err := r.await()
	switch {
	case err != nil:
		return 0, err
	case file != nil:
		return r.readFile(p, file, n)
	}
	c := copy(p, mem)
	r.off += int64(c)
	return c, nil
}

// WriteTo writes the rest of the body to w, as it is written. It implements
// io.WriterTo. Bytes on disk go to an answer's connection without being
// copied through this process.
func (r *Reader) WriteTo(w io.Writer) (int64, error) {
	answer, _ := w.(*answerWriter)
	buf := getCopyBuf()
	defer putCopyBuf(buf)
	var total int64
	for {
		mem, file, n, err := r.await()
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
		var written int64
		osFile, isOS := file.(*os.File)
		switch {
		case file == nil:
			var c int
			c, err = w.Write(mem)
			written = int64(c)
			r.off += written
		case answer != nil && isOS:
			written, err = answer.writeFile(osFile, r.off, n)
			r.off += written
		default:
			var c int
			if c, err = r.readFile(buf[:], file, n); err == nil {
				c, err = w.Write(buf[:c])
				written = int64(c)
			}
		}
		total += written
		if err != nil {
			return total, err
		}
	}
}

// await blocks until something is to be read: n bytes at r.off, which are mem,
// or in file.
func (r *Reader) await() (mem []byte, file spoolFile, n int64, err error) {
	b := r.body
	b.mu.Lock()
	defer b.mu.Unlock()
	for {
		switch n = b.size - r.off; {
		case r.closed:
			return nil, nil, 0, ErrReaderClosed
		case n > 0 && b.file != nil:
			return nil, b.file, n, nil
		case n > 0:
			return b.mem[r.off:b.size:b.size], nil, n, nil
		case b.done && b.err != nil:
			return nil, nil, 0, b.err
		case b.done:
			return nil, nil, 0, io.EOF
		}
		b.more.Wait()
	}
}

// readFile reads up to n bytes at r.off.
func (r *Reader) readFile(p []byte, file spoolFile, n int64) (int, error) {
	c, err := file.ReadAt(p[:min(int64(len(p)), n)], r.off)
	r.off += int64(c)
	if c > 0 {
		return c, nil // an error comes back with the next call
	}
	switch {
	case errors.Is(err, os.ErrClosed): // a concurrent Close gave up the last reference
		return 0, ErrReaderClosed
	case err == io.EOF: // somebody has cut our file
		err = io.ErrUnexpectedEOF
	}
	return 0, fmt.Errorf("spool: read: %w", err)
}

// Close gives up the Reader's reference and unblocks a Read or WriteTo that
// waits. Further calls do nothing. It always returns nil.
func (r *Reader) Close() error {
	b := r.body
	b.mu.Lock()
	if r.closed {
		b.mu.Unlock()
		return nil
	}
	r.closed = true
	b.mu.Unlock()
	b.more.Broadcast()
	b.Release()
	return nil
}

// copyBufSize is the size of the buffers between sockets and bodies: large
// enough that a 100 MB answer costs few system calls, small enough for a
// buffer per connection that is being read or answered.
const copyBufSize = 32 << 10

// gatherAfter is how much of a body is written as it comes. What comes later
// is gathered, since a TLS record is half of a buffer and a write to a file is
// what a large answer costs most.
const gatherAfter = 1 << 20

type copyBuf [copyBufSize]byte

var copyBufs = sync.Pool{New: func() any { return new(copyBuf) }}

func getCopyBuf() *copyBuf  { return copyBufs.Get().(*copyBuf) }
func putCopyBuf(b *copyBuf) { copyBufs.Put(b) }
