//! Asking the kernel what it would do with a packet.
//!
//! A program that is attached nowhere answers, by the functions and the maps of those that steer (see `anyport-ebpf/src/explain.rs`).
//! Question and answer stand in the packet that it is run on. So those that steer do nothing for this, and neither real packets nor
//! another question can get in between.

use std::os::fd::{AsFd as _, OwnedFd};

use anyhow::{Context as _, bail};
use anyport_common::{
    explain::{
        ANSWER_AT, Answer, CONNECTED, DENIED, HOST, NO_SOCKET, PACKET_BYTES, QUESTION_AT, Question, STEER, UNMATCHED,
    },
    flow::Flow,
    maps::SOCKETS_PER_SERVICE,
};
use aya::{Ebpf, programs::SchedClassifier};

use super::{Bpf, hooks::program, load::load_program};
use crate::{
    steering::{BackEnd, Decided, Fate},
    sys::bpf::run_classifier,
};

const PROGRAM: &str = "anyport_explain";

/// The program that answers.
#[derive(Debug)]
pub(super) struct Explainer(OwnedFd);

impl Explainer {
    pub(super) fn load(ebpf: &mut Ebpf, back_end: BackEnd) -> anyhow::Result<Self> {
        let attempt = "load the program that explains";
        let program: &mut SchedClassifier = program(ebpf, PROGRAM)?;
        load_program(back_end, PROGRAM, || program.load())?;
        program.fd().context(attempt)?.as_fd().try_clone_to_owned().map(Self).context(attempt)
    }

    fn ask(&self, flow: &Flow) -> anyhow::Result<Answer> {
        let mut packet = [0; PACKET_BYTES];
        packet[QUESTION_AT..ANSWER_AT].copy_from_slice(bytemuck::bytes_of(&Question::new(flow)));
        let returned = run_classifier(&self.0, &mut packet).context("run the program that explains")?;
        if returned != 0 {
            bail!("run the program that explains: it can't answer ({returned})");
        }
        Ok(bytemuck::pod_read_unaligned(&packet[ANSWER_AT..]))
    }
}

impl Bpf {
    /// What becomes of the first packet of a flow.
    pub(super) fn decide(&self, flow: &Flow) -> anyhow::Result<Decided> {
        let Answer { generation, outcome, rule, service, .. } = self.explainer.ask(flow)?;
        let socket = || {
            let index = service * SOCKETS_PER_SERVICE + flow.socket_offset();
            self.sockets.cookie(index)
        };
        let (fate, rule, cookie) = match outcome {
            UNMATCHED => (Fate::Unmatched, None, None),
            HOST => (Fate::Host, Some(rule), None),
            NO_SOCKET => (Fate::Drop, Some(rule), None),
            // `bpf_sk_assign` refuses such a socket where sockets are looked up (net/core/filter.c), and not at tc.
            CONNECTED if self.hook.back_end() == BackEnd::SkLookup => (Fate::Drop, Some(rule), None),
            STEER | CONNECTED => (Fate::Steer, Some(rule), socket()?),
            DENIED => (Fate::Deny, Some(rule), None),
            other => bail!("the program that explains gave an answer that is not known here: {other}"),
        };
        Ok(Decided { fate, rule, cookie, bound: None, generation: Some(generation) })
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{Ipv4Addr, UdpSocket},
        sync::Arc,
    };

    use anyport_common::flow::{Address, Flow, Transport};

    use crate::{
        rules::{Origin, RuleSet, RuleText},
        steering::{
            BackEnd, Fate, GroupSocket, Holder, Plan, ServiceSockets, Steering as _,
            bpf::tests::{differential::open, in_new_namespace},
        },
    };

    /// A socket of UDP stays in the map of sockets when its owner connects it; then the kernel does not take it any more.
    #[test]
    fn a_socket_that_was_connected_is_not_steered_to() {
        for (back_end, fate) in [(BackEnd::SkLookup, Fate::Drop), (BackEnd::Tc, Fate::Steer)] {
            in_new_namespace(move || {
                let directory = tempfile::tempdir().unwrap();
                let mut bpf = open(back_end, &directory.path().join("bpf"));
                let mut rules = RuleSet::default();
                let rule = r#"{"prefix": "192.0.2.0/24", "protocol": "udp"}"#;
                rules.insert(&serde_json::from_str::<RuleText>(rule).unwrap().into_rule(Origin::Added)).unwrap();
                let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
                let bound = socket.local_addr().unwrap();
                let held = Arc::new(socket.try_clone().unwrap().into());
                let group = GroupSocket { cookie: 0, bound, holder: Holder::Us(held) };
                let plan = Plan {
                    generation: 1,
                    rules: rules.view(),
                    changed: None,
                    fresh: std::slice::from_ref(&(0..1)),
                    freed: &[],
                    moved: &[],
                    services: &[ServiceSockets {
                        slot: 1,
                        name: "default".parse().unwrap(),
                        groups: [None, Some(group), None, None],
                        sources: Arc::default(),
                    }],
                };
                bpf.apply(&plan).unwrap();
                let [source, address] = [0x7f00_0001, 0xc000_0207].map(Address::v4);
                let flow = Flow { source, address, transport: Transport::Udp, port: 53 };
                let decided = bpf.decide(&flow).unwrap();
                assert_eq!(decided.fate, Fate::Steer);
                assert!(decided.cookie.is_some_and(|cookie| cookie != 0));
                socket.connect((Ipv4Addr::LOCALHOST, 1)).unwrap();
                assert_eq!(bpf.decide(&flow).unwrap().fate, fate, "{back_end:?}");
                if back_end == BackEnd::SkLookup {
                    bpf.run(&flow);
                    assert_eq!(bpf.counters().unwrap()(0).assign_error, 1, "so it is dropped");
                }
                Box::new(bpf).detach().unwrap();
            });
        }
    }
}
