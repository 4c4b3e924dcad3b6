package sim

import (
	"encoding/json"
	"net/http"
	"strconv"

	"fsbus/bus/matrix"
)

// Driver returns the handler through which other programs watch and steer the
// world. It asks for no password: it belongs on loopback.
//
//	GET  /stats                      Stats
//	GET  /stats?server=I             ServerStats of server I
//	GET  /servers                    names and kinds
//	POST /reset                      Reset
//	POST /kind?server=I&kind=NAME    SetKind
func (w *World) Driver() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /stats", func(rw http.ResponseWriter, r *http.Request) {
		if !r.URL.Query().Has("server") {
			writeJSON(rw, w.Stats())
			return
		}
		if i, ok := w.serverOf(rw, r); ok {
			writeJSON(rw, w.Server(i))
		}
	})
	mux.HandleFunc("GET /servers", func(rw http.ResponseWriter, _ *http.Request) {
		type row struct {
			Name matrix.ServerName `json:"name"`
			Kind string            `json:"kind"`
		}
		rows := make([]row, len(w.servers))
		for i, s := range w.servers {
			rows[i] = row{s.name, s.kindNow().String()}
		}
		writeJSON(rw, rows)
	})
	mux.HandleFunc("POST /reset", func(rw http.ResponseWriter, _ *http.Request) {
		w.Reset()
		writeJSON(rw, object{})
	})
	mux.HandleFunc("POST /kind", func(rw http.ResponseWriter, r *http.Request) {
		i, ok := w.serverOf(rw, r)
		if !ok {
			return
		}
		kind, err := ParseKind(r.URL.Query().Get("kind"))
		if err != nil {
			http.Error(rw, err.Error(), http.StatusBadRequest)
			return
		}
		if err := w.SetKind(i, kind); err != nil {
			http.Error(rw, err.Error(), http.StatusConflict)
			return
		}
		writeJSON(rw, object{})
	})
	return mux
}

// serverOf reads the parameter "server". If it is no server's number it answers
// 400 and reports false.
func (w *World) serverOf(rw http.ResponseWriter, r *http.Request) (int, bool) {
	i, err := strconv.Atoi(r.URL.Query().Get("server"))
	if err != nil || i < 0 || i >= len(w.servers) {
		http.Error(rw, "server: want a number below "+strconv.Itoa(len(w.servers)), http.StatusBadRequest)
		return 0, false
	}
	return i, true
}

func writeJSON(rw http.ResponseWriter, v any) {
	rw.Header().Set("Content-Type", "application/json")
	e := json.NewEncoder(rw)
	e.SetIndent("", "  ")
	e.Encode(v)
}
