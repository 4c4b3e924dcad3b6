// Package sched holds what the bus is scheduled with: time as a value, budgets
// as types, timers, fair queues, class weights, rate limits, back-off, the one
// event loop and the fixed worker pool.
//
// Everything but clock.go, loop.go and pool.go is pure: time is an argument,
// randomness is handed in, nothing blocks and nothing starts a goroutine, so
// the same code runs under a real clock and under the seeded simulation of
// package bus/sim.
//
// # The loop
//
// Loop owns a Machine. It takes events from one channel, reads the clock once
// for up to 64 of them, calls Step for each and then hands all effects, in
// order, to the executor. Duties of whoever assembles a loop:
//
//  1. Effects are executed in the order in which they come; the executor
//     decides nothing and never blocks.
//  2. Each operation that an effect starts is answered by exactly one
//     completion event, also after a panic, a time-out or a cancellation.
//  3. Whatever executes operations has room for as many as the machine may
//     start, so that the loop never waits for a worker that waits for the loop.
//
// # The pool
//
// Pool runs jobs on a number of goroutines that is fixed when it is made. Its
// queue has room for all jobs that the machine may have under way; Submit
// beyond that is a broken invariant. A job that panics still ends:
// the panic is counted and handed to the job's own completion.
package sched
