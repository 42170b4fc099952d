//! The test harness: private network namespaces, the hosts in them, a daemon under test and ways to dial it.
//!
//! Nothing here touches the network of the machine: [`prerequisites::isolate`] gives the process a mount namespace of
//! its own, every [`netns::Netns`] is anonymous and ends with its handle, and no namespace has a way out. Only
//! addresses from documentation prefixes and 127.0.0.0/8 appear.
//!
//! Functions panic with what was expected and what was seen: they serve tests, where the line that
//! panicked is the best message.

pub mod backbone;
pub mod browser;
pub mod container;
pub mod daemon;
pub mod dial;
pub mod driver;
pub mod etcd;
pub mod etcdctl;
pub mod exposition;
pub mod faults;
pub mod holdings;
pub mod host;
pub mod http;
pub mod netns;
pub mod numbers;
pub mod owners;
pub mod packet;
pub mod plot;
pub mod prefixes;
pub mod prerequisites;
pub mod promptness;
pub mod random;
pub mod schema;
pub mod screenshot;
pub mod servers;
pub mod steady;
pub mod systemd;
pub mod topology;
