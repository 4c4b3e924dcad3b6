package store

import "testing"

func TestQueueBoundsAreReachedAndHold(t *testing.T) {
	q := newQueue(3, 100)
	put := func(size int64, wantErr error) {
		t.Helper()
		if err := q.put(job{size: size}); err != wantErr {
			t.Errorf("put of %d: %v, want %v", size, err, wantErr)
		}
	}
	held := func(jobs int, bytes int64) {
		t.Helper()
		if n, b := q.len(); n != jobs || b != bytes {
			t.Errorf("holds %d jobs, %d bytes, want %d, %d", n, b, jobs, bytes)
		}
	}
	put(101, ErrTooLarge)
	put(100, nil)
	put(1, ErrQueueFull) // bytes
	if got := q.take(nil, 10, 10); len(got) != 1 {
		t.Errorf("took %d jobs, want the one that is larger than the group", len(got))
	}
	held(0, 0)
	put(10, nil)
	put(20, nil)
	put(30, nil)
	put(1, ErrQueueFull) // number
	held(3, 60)
	if got := q.take(nil, 10, 30); len(got) != 2 || got[0].size != 10 || got[1].size != 20 {
		t.Errorf("took %v, want 10 and 20", got)
	}
	held(1, 30)
	put(5, nil)
	if got := q.take(nil, 1, 1000); len(got) != 1 || got[0].size != 30 {
		t.Errorf("took %v, want 30", got)
	}

	q.close(false)
	put(1, ErrClosed)
	if got := q.take(nil, 10, 1000); len(got) != 1 || got[0].size != 5 {
		t.Errorf("took %v after close, want 5", got)
	}
	if got := q.take(nil, 10, 1000); len(got) != 0 {
		t.Errorf("took %v of nothing", got)
	}
	for i, j := range q.jobs[:cap(q.jobs)] {
		if j.size != 0 {
			t.Errorf("place %d still refers to what was taken", i)
		}
	}
}

func TestAbandonedQueueGivesTheRestOnlyOnce(t *testing.T) {
	q := newQueue(3, 100)
	q.put(job{size: 1})
	q.put(job{size: 2})
	q.close(true)
	if got := q.take(nil, 10, 100); len(got) != 0 {
		t.Errorf("took %v", got)
	}
	if got := q.rest(); len(got) != 2 || got[0].size != 1 || got[1].size != 2 {
		t.Errorf("rest %v", got)
	}
	if n, b := q.len(); n != 0 || b != 0 || len(q.rest()) != 0 {
		t.Errorf("%d jobs, %d bytes left", n, b)
	}
}
