//! Services with real sockets, dialled at the loopback addresses that their groups are bound to.

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

use tokio::runtime::{Builder, Runtime};

use super::{Commons, DescriptorPool, HandlerKind, Service, ServiceConfig};

const TIMEOUT: Duration = Duration::from_secs(5);
/// The groups' places.
const TCP: [usize; 2] = [0, 2];
const UDP: [usize; 2] = [1, 3];

struct Scene {
    service: Service,
    runtime: Runtime,
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
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let commons = Commons {
            runtime: runtime.handle().clone(),
            workers: NonZeroUsize::new(3).unwrap(),
            descriptors,
            loop_guard: Arc::new(loop_guard),
        };
        let config = ServiceConfig { name: "test".parse().unwrap(), handler, banner: banner.map(Into::into) };
        let service = Service::start(config, &commons).unwrap();
        Self { service, runtime }
    }

    fn address(&self, group: usize) -> SocketAddr {
        self.service.groups()[group].as_ref().unwrap().bound
    }

    fn dial(&self, group: usize) -> TcpStream {
        let stream = TcpStream::connect(self.address(group)).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream
    }

    fn stop(self) {
        let Self { service, runtime } = self;
        runtime.block_on(service.stop());
    }
}

fn rest(stream: &mut TcpStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn eventually(what: &str, is_true: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_true() {
        assert!(start.elapsed() < TIMEOUT, "{what}");
        sleep(Duration::from_millis(2));
    }
}
