package sim

import (
	"context"
	"io"
	"net/http"
	"time"
)

// pacer writes to a client slowly, in small pieces that are sent at once.
type pacer struct {
	ctx     context.Context
	out     http.ResponseWriter
	perByte float64 // nanoseconds
	step    int64   // bytes that are sent at a time
	begun   time.Time
	sent    int64
}

// newPacer sends the headers, and returns a writer that takes drip for size bytes
// and sends no more than rate of them in a second; 0 is no bound.
func newPacer(ctx context.Context, out http.ResponseWriter, size int64, drip time.Duration, rate int64) io.Writer {
	// A hundred pieces are few enough to be cheap and many enough to look even.
	const pieces = 100
	p := &pacer{ctx: ctx, out: out, step: 32 << 10, begun: time.Now()}
	if drip > 0 && size > 0 {
		p.perByte = float64(drip) / float64(size)
		p.step = min(p.step, size/pieces)
	}
	if rate > 0 {
		p.perByte = max(p.perByte, float64(time.Second)/float64(rate))
		p.step = min(p.step, rate/pieces)
	}
	p.step = max(p.step, 1)
	p.flush()
	return p
}

// Write returns when the last byte was due. It fails when the client has left.
func (p *pacer) Write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		n := int(min(p.step, int64(len(b)-done)))
		due := p.begun.Add(time.Duration(p.perByte * float64(p.sent+int64(n))))
		if !pause(p.ctx, time.Until(due)) {
			return done, p.ctx.Err()
		}
		n, err := p.out.Write(b[done : done+n])
		done += n
		p.sent += int64(n)
		if err == nil {
			err = p.flush()
		}
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

func (p *pacer) flush() error { return http.NewResponseController(p.out).Flush() }
