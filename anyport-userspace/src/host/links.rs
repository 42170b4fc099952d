//! The network interfaces of the thread's network namespace, as the kernel lists them over `RTM_GETLINK`: also those that have no
//! address of any kind, such as tunnels.

use anyhow::Context as _;
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkFlags, LinkMessage},
};
use netlink_sys::protocols::NETLINK_ROUTE;

use super::dump::dump;

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// `ARPHRD_…`, which says how its packets begin.
    pub link_type: u16,
    /// Whether it is up.
    pub is_up: bool,
}

/// All interfaces.
///
/// # Errors
/// The kernel does not list them.
pub fn links() -> anyhow::Result<Vec<Link>> {
    let mut links = Vec::new();
    dump(NETLINK_ROUTE, RouteNetlinkMessage::GetLink(LinkMessage::default()), |message| {
        let RouteNetlinkMessage::NewLink(LinkMessage { header, attributes, .. }) = message else { return };
        let name = attributes.into_iter().find_map(|it| match it {
            LinkAttribute::IfName(name) => Some(name),
            _ => None,
        });
        links.extend(name.map(|name| Link {
            index: header.index,
            name,
            link_type: header.link_layer_type.into(),
            is_up: header.flags.contains(LinkFlags::Up),
        }));
    })
    .context("list the interfaces")?;
    Ok(links)
}
