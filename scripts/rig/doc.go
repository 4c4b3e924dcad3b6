// Package rig sets up what the demo and the benchmarks run on: a simulated
// federation within the process (Federation), the fsbus binary before it as a
// child process (StartBus), and what can be told from the outside about a child:
// its memory, processor time and files (Process.Usage), and about fsbus the
// status that it shows everybody (Bus.Status, Bus.Watch).
//
// It needs Linux: /proc, and a loopback that has all of 127.1.0.0/16.
package rig
