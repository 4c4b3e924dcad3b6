package netx

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"
	"testing/synctest"
)

// pattern returns n bytes in which every position is recognisable.
func pattern(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, uint64(n)))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func mustWrite(t testing.TB, b *Body, p []byte) {
	t.Helper()
	if n, err := b.Write(p); n != len(p) || err != nil {
		t.Fatalf("Write of %d: %d, %v", len(p), n, err)
	}
}

func readAll(t testing.TB, b *Body) []byte {
	t.Helper()
	r := b.Reader()
	defer r.Close()
	got, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func wantStats(t testing.TB, s *Spool, memory, disk int64, files int) {
	t.Helper()
	if st := s.Stats(); st.Memory != memory || st.Disk != disk || st.Files != files {
		t.Errorf("%d bytes in memory, %d on disk, %d files; want %d, %d, %d", st.Memory, st.Disk, st.Files, memory, disk, files)
	}
}

func TestBodySizes(t *testing.T) {
	s := newTestSpool(t, SpoolConfig{Memory: 1 << 20, Disk: 1 << 20, Inline: 1000})
	for _, size := range []int{0, 1, 999, 1000, 1001, 5000, 200_000} {
		for _, step := range []int{1, 7, 512, 1000, 1 << 20} {
			want := pattern(size)
			b := s.New()
			for rest := want; len(rest) > 0; {
				n := min(max(step, size/100), len(rest))
				mustWrite(t, b, rest[:n])
				rest = rest[n:]
			}
			if b.Complete() {
				t.Error("complete too soon")
			}
			if _, ok := b.Bytes(); ok {
				t.Error("Bytes of an incomplete body")
			}
			b.CloseWrite(nil)
			b.CloseWrite(errors.New("too late"))
			if !b.Complete() || b.Size() != int64(size) || !bytes.Equal(readAll(t, b), want) {
				t.Errorf("%d bytes by %d: wrong content", size, step)
			}
			got, ok := b.Bytes()
			if ok != (size <= 1000) || ok && !bytes.Equal(got, want) {
				t.Errorf("%d bytes by %d: Bytes returns %d, %v", size, step, len(got), ok)
			}
			if size <= 1000 {
				if m := s.Stats().Memory; m > int64(size)*9/8 {
					t.Errorf("%d bytes by %d cost %d bytes of memory", size, step, m)
				}
			} else {
				wantStats(t, s, 0, int64(size), 1)
			}
			var copied bytes.Buffer
			r := b.Reader()
			if n, err := io.Copy(&copied, r); n != int64(size) || err != nil || !bytes.Equal(copied.Bytes(), want) {
				t.Errorf("%d bytes by %d: WriteTo %d, %v", size, step, n, err)
			}
			b.Release() // the reader keeps it
			if err := iotest.TestReader(onlyReader{r}, nil); err != nil {
				t.Error(err)
			}
			r.Close()
			wantStats(t, s, 0, 0, 0)
		}
	}
}

type onlyReader struct{ io.Reader }

func TestBodyReadersWhileItIsWritten(t *testing.T) {
	for _, size := range []int{900, 100_000} { // in memory, and moving to disk on the way
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			s := newTestSpool(t, SpoolConfig{Memory: 1 << 20, Disk: 1 << 20, Inline: 1000})
			want := pattern(size)
			b := s.New()
			var wg sync.WaitGroup
			for i := range 8 {
				r := b.Reader()
				wg.Go(func() {
					defer r.Close()
					var got []byte
					var err error
					if i%2 == 0 {
						got, err = io.ReadAll(iotest.OneByteReader(r))
					} else {
						var buf bytes.Buffer
						_, err = io.Copy(&buf, r)
						got = buf.Bytes()
					}
					if err != nil || !bytes.Equal(got, want) {
						t.Errorf("reader %d: %d bytes, %v", i, len(got), err)
					}
				})
			}
			if n, err := b.ReadFrom(onlyReader{iotest.HalfReader(bytes.NewReader(want))}); n != int64(size) || err != nil {
				t.Errorf("ReadFrom: %d, %v", n, err)
			}
			b.CloseWrite(nil)
			wg.Wait()
			if !bytes.Equal(readAll(t, b), want) {
				t.Error("a late reader gets something else")
			}
			b.Release()
			wantStats(t, s, 0, 0, 0)
		})
	}
}

func TestBodyReaderWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestSpool(t, SpoolConfig{Memory: 100})
		b := s.New()
		r := b.Reader()
		type result struct {
			s   string
			err error
		}
		results := make(chan result)
		go func() {
			p := make([]byte, 10)
			for {
				n, err := r.Read(p)
				results <- result{string(p[:n]), err}
				if err != nil {
					return
				}
			}
		}()
		step := func(do func(), want result) {
			t.Helper()
			synctest.Wait()
			select {
			case got := <-results:
				t.Fatalf("did not wait: %+v", got)
			default:
			}
			do()
			if got := <-results; got != want {
				t.Fatalf("%+v instead of %+v", got, want)
			}
		}
		cut := errors.New("cut")
		step(func() { mustWrite(t, b, []byte("ab")) }, result{"ab", nil})
		step(func() { mustWrite(t, b, []byte("c")) }, result{"c", nil})
		step(func() { b.CloseWrite(cut) }, result{"", cut})

		second := b.Reader()
		if got, err := io.ReadAll(second); string(got) != "abc" || err != cut {
			t.Errorf("later: %q, %v", got, err)
		}
		if b.Complete() {
			t.Error("a cut body is complete")
		}
		if _, ok := b.Bytes(); ok {
			t.Error("Bytes of a cut body")
		}
		second.Close()
		r.Close()
		b.Release()
	})
}

func TestBodyReaderCloseUnblocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newTestSpool(t, SpoolConfig{Memory: 100})
		b := s.New()
		r1, r2 := b.Reader(), b.Reader()
		errs := make(chan error)
		go func() {
			_, err := r1.Read(make([]byte, 1))
			errs <- err
		}()
		go func() {
			_, err := r2.WriteTo(io.Discard)
			errs <- err
		}()
		synctest.Wait()
		for _, r := range []*Reader{r1, r2} {
			r.Close()
			r.Close()
			if err := <-errs; err != ErrReaderClosed {
				t.Error(err)
			}
		}
		b.Release()
		if _, err := r1.Read(make([]byte, 1)); err != ErrReaderClosed {
			t.Error(err)
		}
	})
}

// Closing the last reader while it reads from disk closes the file under it.
func TestBodyReaderCloseDuringDiskRead(t *testing.T) {
	s := newTestSpool(t, SpoolConfig{Disk: 1 << 20})
	for range 50 {
		b := s.New()
		mustWrite(t, b, pattern(100_000))
		r := b.Reader()
		b.Release()
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := io.Copy(io.Discard, onlyReader{r}); err != ErrReaderClosed {
				t.Error(err)
			}
		})
		wg.Go(func() { r.Close() })
		wg.Wait()
		wantStats(t, s, 0, 0, 0)
	}
}

func TestBodyEOFIsNoWayToEndEarly(t *testing.T) {
	s := newTestSpool(t, SpoolConfig{Memory: 100})
	b := s.New()
	b.CloseWrite(io.EOF)
	r := b.Reader()
	if _, err := r.Read(make([]byte, 1)); err != io.ErrUnexpectedEOF {
		t.Error(err)
	}
	r.Close()
	b.Release()
}

func TestSpoolMemoryBudget(t *testing.T) {
	s := newTestSpool(t, SpoolConfig{Memory: 1000, Disk: 10_000, Inline: 600})
	a, b, c := s.New(), s.New(), s.New()
	mustWrite(t, a, pattern(600))
	mustWrite(t, b, pattern(400))
	wantStats(t, s, 1000, 0, 0)
	mustWrite(t, c, pattern(1)) // small, but there is no memory left
	wantStats(t, s, 1000, 1, 1)
	mustWrite(t, b, pattern(1))
	wantStats(t, s, 600, 402, 2)
	d := s.New()
	mustWrite(t, d, pattern(250))
	mustWrite(t, d, pattern(100)) // doubling has no room, 350 bytes do
	wantStats(t, s, 950, 402, 2)
	for _, x := range []*Body{a, b, c, d} {
		x.Release()
	}
	wantStats(t, s, 0, 0, 0)
	if st := s.Stats(); st.MaxMemory != 1000 || st.MaxDisk != 402 || st.MaxFiles != 2 || st.Full != 0 {
		t.Errorf("%+v", st)
	}
}

func TestSpoolDiskAndFileBudgets(t *testing.T) {
	s := newTestSpool(t, SpoolConfig{Disk: 1000, Files: 2})
	a, b, c := s.New(), s.New(), s.New()
	mustWrite(t, a, pattern(900))
	mustWrite(t, b, pattern(100))
	for _, x := range []*Body{a, b, c} { // no bytes for the first two, and no file for the third
		if n, err := x.Write([]byte("x")); n != 0 || err != ErrSpoolFull {
			t.Errorf("%d, %v", n, err)
		}
	}
	freed := s.room()
	select {
	case <-freed:
		t.Error("room without a release")
	default:
	}
	b.Release()
	<-freed
	mustWrite(t, c, pattern(100)) // the refused write, again
	a.CloseWrite(nil)
	if !bytes.Equal(readAll(t, a), pattern(900)) {
		t.Error("a refused write has left its traces")
	}
	if st := s.Stats(); st.Full != 3 || st.MaxFiles != 2 || st.MaxDisk != 1000 {
		t.Errorf("%+v", st)
	}
	a.Release()
	c.Release()
	wantStats(t, s, 0, 0, 0)

	memoryOnly := newTestSpool(t, SpoolConfig{Memory: 1000, Inline: 10})
	d := memoryOnly.New()
	if _, err := d.Write(pattern(11)); err != ErrSpoolFull {
		t.Error(err)
	}
	d.Release()
}

func TestBodyDiskFaults(t *testing.T) {
	var fault error
	s := newTestSpool(t, SpoolConfig{Memory: 1 << 20, Disk: 1 << 20, Inline: 100})
	s.open = faultyOpenVar(&fault)
	want := pattern(500)
	b := s.New()
	mustWrite(t, b, want[:100])
	for _, test := range []struct {
		fault error
		full  bool
	}{{syscall.ENOSPC, true}, {syscall.EDQUOT, true}, {syscall.EIO, false}} {
		fault = test.fault
		n, err := b.Write(want[100:200])
		if n != 0 || !errors.Is(err, test.fault) || errors.Is(err, ErrSpoolFull) != test.full {
			t.Errorf("moving to disk: %d, %v", n, err)
		}
		wantStats(t, s, 100, 0, 0)
	}
	s.open = func(string) (spoolFile, error) { return nil, syscall.EMFILE }
	if _, err := b.Write(want[100:200]); !errors.Is(err, syscall.EMFILE) {
		t.Error(err)
	}
	wantStats(t, s, 100, 0, 0)

	s.open = faultyOpenVar(&fault)
	fault = nil
	mustWrite(t, b, want[100:200])
	fault = syscall.ENOSPC
	if n, err := b.Write(want[200:]); n != 0 || !errors.Is(err, ErrSpoolFull) {
		t.Errorf("%d, %v", n, err)
	}
	wantStats(t, s, 0, 200, 1)
	fault = nil
	mustWrite(t, b, want[200:])
	b.CloseWrite(nil)
	if !bytes.Equal(readAll(t, b), want) {
		t.Error("the content has changed")
	}
	b.Release()
	wantStats(t, s, 0, 0, 0)
}

func TestBodyReadFaults(t *testing.T) {
	s := newTestSpool(t, SpoolConfig{Disk: 1000})
	b := s.New()
	mustWrite(t, b, pattern(100))
	if err := b.file.(*os.File).Truncate(50); err != nil {
		t.Fatal(err)
	}
	r := b.Reader()
	if got, err := io.ReadAll(r); len(got) != 50 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	r.Close()
	b.Release()
}

func TestBodyFilesAreUnlinked(t *testing.T) {
	s := newTestSpool(t, SpoolConfig{Disk: 1000})
	b := s.New()
	mustWrite(t, b, pattern(100))
	if entries, err := os.ReadDir(s.dir); err != nil || len(entries) != 0 {
		t.Errorf("%v, %v", entries, err)
	}
	b.Release()
}

func TestBodyReadFromErrors(t *testing.T) {
	s := newTestSpool(t, SpoolConfig{Memory: 10, Inline: 10})
	b := s.New()
	if n, err := b.ReadFrom(iotest.TimeoutReader(iotest.OneByteReader(bytes.NewReader(pattern(5))))); n != 1 || err != iotest.ErrTimeout {
		t.Errorf("%d, %v", n, err)
	}
	if n, err := b.ReadFrom(bytes.NewReader(pattern(10))); n != 0 || err != ErrSpoolFull {
		t.Errorf("%d, %v", n, err)
	}
	b.Release()
}

func TestBodyUseAfterFreePanics(t *testing.T) {
	s := newTestSpool(t, SpoolConfig{Memory: 100})
	for name, use := range map[string]func(*Body){
		"Write":      func(b *Body) { b.Write(nil) },
		"CloseWrite": func(b *Body) { b.CloseWrite(nil) },
		"Reader":     func(b *Body) { b.Reader() },
		"Size":       func(b *Body) { b.Size() },
		"Complete":   func(b *Body) { b.Complete() },
		"Bytes":      func(b *Body) { b.Bytes() },
		"Retain":     func(b *Body) { b.Retain() },
		"Release":    func(b *Body) { b.Release() },
	} {
		b := s.New()
		b.Retain()
		b.Release()
		b.Release()
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			use(b)
		}()
	}
	defer func() {
		if recover() == nil {
			t.Error("Write after CloseWrite: no panic")
		}
	}()
	b := s.New()
	defer b.Release()
	b.CloseWrite(nil)
	b.Write([]byte("x"))
}
