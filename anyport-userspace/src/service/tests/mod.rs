//! Services with real sockets, dialled at the loopback addresses that their groups are bound to.

mod forward;
mod life;
mod tcp;
mod udp;

use std::{
    io::Read as _,
    net::{SocketAddr, TcpStream},
    num::NonZeroUsize,
    sync::Arc,
    thread::sleep,
    time::{Duration, Instant},
};

use tokio::runtime::Runtime;

use super::{
    Capacity, DescriptorPool, HandlerKind, Limits, Lineages, Service, ServiceConfig, SharedContext, Witness, Workers,
};
use crate::keeper::Link;

const TIMEOUT: Duration = Duration::from_secs(5);
/// The groups' places.
const TCP: [usize; 2] = [0, 2];
const UDP: [usize; 2] = [1, 3];

struct Scene {
    service: Service,
    workers: Workers,
}

impl Scene {
    fn new(handler: HandlerKind, banner: Option<&str>) -> Self {
        Self::with(handler, banner, DescriptorPool::new(100), |_, _| false)
    }

    fn with(
        handler: HandlerKind,
        banner: Option<&str>,
        descriptors: DescriptorPool,
        loop_guard: fn(SocketAddr, SocketAddr) -> bool,
    ) -> Self {
        let config =
            ServiceConfig { banner: banner.map(Into::into), ..ServiceConfig::new("test".parse().unwrap(), handler) };
        Self::of(config, descriptors, loop_guard)
    }

    fn of(config: ServiceConfig, descriptors: DescriptorPool, loop_guard: fn(SocketAddr, SocketAddr) -> bool) -> Self {
        let workers = Workers::start(NonZeroUsize::new(3).unwrap()).unwrap();
        let commons = SharedContext {
            workers: workers.handles(),
            control: workers.handles().first().clone(),
            capacity: Capacity::new(Limits::default(), descriptors.clone()),
            sees_to_sources: true,
            descriptors,
            loop_guard: Arc::new(loop_guard),
            forward_guard: Arc::new(|_, _, _| false),
            lineages: Lineages::default(),
            publisher: None,
            witness: Witness::new(Arc::new(|_| false)),
            keeper: Link::default(),
        };
        let service = Service::start(config, &commons).unwrap();
        Self { service, workers }
    }

    fn address(&self, group: usize) -> SocketAddr {
        self.service.groups()[group].as_ref().unwrap().bound
    }

    fn dial(&self, group: usize) -> TcpStream {
        let stream = TcpStream::connect(self.address(group)).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream
    }

    /// Stops the service; connections go on for as long as the workers are there.
    fn stop(self) -> Workers {
        let Self { service, workers } = self;
        Runtime::new().unwrap().block_on(service.stop());
        workers
    }
}

fn rest(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn eventually(what: &str, is_true: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_true() {
        assert!(start.elapsed() < TIMEOUT, "{what}");
        sleep(Duration::from_millis(2));
    }
}
