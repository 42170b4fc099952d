//! What becomes of a flow, for `explain`.
//!
//! A program of its own, which is attached nowhere: the daemon runs it (`BPF_PROG_TEST_RUN`, for this type since Linux 4.12; for
//! `sk_lookup` only since 5.13). It asks the same maps by the same functions as those that steer, and counts and publishes nothing.

use anyport_common::{
    explain::{ANSWER_AT, Answer, CONNECTED, DENIED, HOST, NO_SOCKET, QUESTION_AT, Question, STEER, UNMATCHED},
    flow::Flow,
    table::Verdict,
};
use aya_ebpf::{
    bindings::{TC_ACT_OK, TC_ACT_SHOT},
    helpers::bpf_sk_release,
    programs::TcContext,
};

use crate::maps::{Judged, look_up, socket};

const TCP_ESTABLISHED: u32 = 1;

/// Answers the question in the packet; fails if there is none.
#[inline(always)]
pub fn explain(ctx: &TcContext) -> i32 {
    match answer(ctx) {
        Some(()) => TC_ACT_OK,
        None => TC_ACT_SHOT,
    }
}

#[inline(always)]
fn answer(ctx: &TcContext) -> Option<()> {
    let question: Question = ctx.load(QUESTION_AT).ok()?;
    let flow = question.flow()?;
    let Judged { verdict, generation } = look_up(&flow)?;
    let (outcome, rule, service) = match verdict {
        Verdict::Unmatched => (UNMATCHED, 0, 0),
        Verdict::Host { rule } => (HOST, rule, 0),
        Verdict::Steer { rule, service } => (outcome(service, &flow), rule, service.into()),
        Verdict::Deny { rule } => (DENIED, rule, 0),
    };
    let answer = Answer { generation, outcome, rule, service, reserved: 0 };
    ctx.store(ANSWER_AT, &answer, 0).ok()
}

/// Whether the service has a socket that can be assigned.
#[inline(always)]
fn outcome(service: u16, flow: &Flow) -> u32 {
    let Some(socket) = socket(service, flow) else { return NO_SOCKET };
    // SAFETY: the socket is read only while it is referenced.
    let state = unsafe {
        let state = (*socket.as_ptr()).state;
        bpf_sk_release(socket.as_ptr().cast());
        state
    };
    if state == TCP_ESTABLISHED { CONNECTED } else { STEER }
}
