//! One direction of a connection.

use std::io;

use super::{super::pipe::Pipe, InitialData};
use crate::service::{
    descriptors::DescriptorPool,
    event_loop::{Context, Next, Stream},
};

/// A pipe is used for a direction that has moved at least so many bytes ...
const PIPE_AFTER: u64 = 256 << 10;
/// ... and at least so many since it was last woken, or the time before. For less, two calls of splice(2) cost more than
/// the copy that they spare.
const PIPE_RUN: usize = 64 << 10;
/// How often a direction reads before other connections are served.
const READS: u32 = 16;

/// Which socket failed.
pub(super) enum Fault {
    Source(io::Error),
    Sink(io::Error),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// `kept` is to be sent together with what the source says, if that is there already.
    InitialData,
    Open,
    /// The source has said all.
    Flushing,
    Ended,
}

/// What goes from a source to a sink.
#[derive(Debug)]
pub(super) struct Direction {
    /// What the sink has not taken yet, from `sent` on.
    kept: Vec<u8>,
    sent: usize,
    pipe: Option<Box<Pipe>>,
    stage: Stage,
    /// Whether the source was reset: what it had said is delivered, without an end behind it.
    is_cut: bool,
    /// Bytes of the source so far.
    moved: u64,
    /// Bytes moved when this last had something to move.
    run: usize,
}

impl Direction {
    pub(super) fn new(InitialData { bytes, header, has_ended, reset: _ }: InitialData) -> Self {
        let stage = match bytes.is_empty() {
            _ if has_ended => Stage::Flushing,
            true => Stage::Open,
            false => Stage::InitialData,
        };
        let moved = (bytes.len() - header) as u64;
        Self { kept: bytes, sent: 0, pipe: None, stage, is_cut: false, moved, run: 0 }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.stage == Stage::Ended
    }

    /// Has what the source, which was reset, said before delivered without an end behind it.
    pub(super) fn cut(&mut self) {
        self.is_cut = true;
    }

    /// Bytes of the source that the sink has taken.
    pub(super) fn taken(&self) -> u64 {
        let waiting = self.kept.len() - self.sent + self.pipe.as_ref().map_or(0, |pipe| pipe.len());
        // A header of ours waits, too, and is not among those that were moved.
        self.moved.saturating_sub(waiting as u64)
    }

    /// Moves as much as goes now. `is_last` says that the other direction has ended, so that the sockets will be closed
    /// when this one has. A source that is reset is reported once, and what it had said goes on to be moved.
    pub(super) fn advance(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Stream,
        to: &mut Stream,
        is_last: bool,
        pool: &DescriptorPool,
    ) -> Result<Next, Fault> {
        let before = self.moved;
        let mut next = Next::Reschedule;
        for _ in 0..READS {
            if self.stage != Stage::InitialData && !self.flush(cx, to).map_err(Fault::Sink)? {
                next = Next::Wait;
                break;
            }
            if self.stage == Stage::Flushing {
                if !is_last && !self.is_cut {
                    to.end().map_err(Fault::Sink)?;
                }
                self.stage = Stage::Ended;
            }
            if self.stage == Stage::Ended || !self.read(cx, from, to, before, pool)? {
                next = Next::Wait;
                break;
            }
        }
        if let Some(pipe) = self.pipe.take_if(|pipe| pipe.is_empty()) {
            pipe.give_back();
        }
        if self.moved > before {
            self.run = usize::try_from(self.moved - before).unwrap_or(usize::MAX);
        }
        Ok(next)
    }

    /// Reads once; whether there was anything. `before` is what was moved when it was woken.
    fn read(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut Stream,
        to: &mut Stream,
        before: u64,
        pool: &DescriptorPool,
    ) -> Result<bool, Fault> {
        let run = usize::try_from(self.moved - before).unwrap_or(usize::MAX);
        let is_bulk = self.moved >= PIPE_AFTER && (self.run >= PIPE_RUN || run >= PIPE_RUN);
        if self.pipe.is_none() && is_bulk && self.stage == Stage::Open {
            self.pipe = Pipe::take(pool);
        }
        let Some(pipe) = &mut self.pipe else { return self.copy(cx, from, to) };
        match from.read_by(|from| pipe.fill(from)) {
            Ok(Some(read)) => {
                self.account(read);
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(error) => self.source_broke(error),
        }
    }

    fn account(&mut self, read: usize) {
        self.moved += read as u64;
        self.stage = if read == 0 { Stage::Flushing } else { Stage::Open };
    }

    /// The source says no more, and has not ended its words. True if that is known already.
    fn source_broke(&mut self, error: io::Error) -> Result<bool, Fault> {
        self.stage = Stage::Flushing;
        if std::mem::replace(&mut self.is_cut, true) { Ok(true) } else { Err(Fault::Source(error)) }
    }

    /// Whether the end of the stream follows at once.
    fn is_last_word(&self) -> bool {
        self.stage == Stage::Flushing && !self.is_cut
    }

    /// Whether nothing is kept any more.
    fn flush(&mut self, cx: &Context<'_>, to: &mut Stream) -> io::Result<bool> {
        while self.sent < self.kept.len() {
            match to.write(cx.watcher, &self.kept[self.sent..], self.is_last_word())? {
                None => return Ok(false),
                Some(written) => self.sent += written,
            }
        }
        if self.sent > 0 {
            (self.kept, self.sent) = (Vec::new(), 0);
        }
        while let Some(pipe) = self.pipe.as_mut().filter(|pipe| !pipe.is_empty()) {
            if to.write_by(cx.watcher, |to| pipe.drain(to))?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Reads into the worker's buffer, behind what goes first, and writes what the sink takes; keeps the rest. Whether
    /// there was anything.
    fn copy(&mut self, cx: &mut Context<'_>, from: &mut Stream, to: &mut Stream) -> Result<bool, Fault> {
        let first = self.kept.len();
        cx.buffer[..first].copy_from_slice(&self.kept);
        let mut length = first;
        let mut outcome = Ok(true);
        loop {
            match from.read(&mut cx.buffer[length..]) {
                Ok(None) => break,
                Ok(Some(read)) => {
                    length += read;
                    self.account(read);
                    // The end that is known leaves with the last words.
                    if read == 0 || length == cx.buffer.len() || !from.has_end() {
                        break;
                    }
                }
                Err(error) => {
                    outcome = self.source_broke(error);
                    break;
                }
            }
        }
        if self.stage == Stage::InitialData {
            self.stage = Stage::Open;
        } else if length == first && self.stage == Stage::Open {
            return Ok(false);
        }
        let words = &cx.buffer[..length];
        let mut written = 0;
        while written < words.len() {
            match to.write(cx.watcher, &words[written..], self.is_last_word()).map_err(Fault::Sink)? {
                None => break,
                Some(count) => written += count,
            }
        }
        self.kept = words[written..].to_vec();
        outcome
    }
}
