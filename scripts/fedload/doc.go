// Package fedload puts load on the bus as Synapse does: through its outbound
// federation hook, with one connection for each request, every request signed.
//
// A Client of NewHook speaks to a bus, one of NewDirect straight to the
// simulated servers (package fedsim/sim), so that the same requests tell what
// the bus adds. Client.Do makes one request, Client.Run many. Requests are made
// by Lookup, Send, Media and others and, from traffic of a real Synapse, Replay.
// A Joiner goes through the steps of a join.
package fedload
