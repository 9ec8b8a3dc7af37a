//! Which ports a local cluster listens on.

use super::service::Kind;

/// How ports are chosen. Ports of metrics and readiness are always the kernel's choice; `cluster.json` lists them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ports {
    /// By the kernel: any number of clusters side by side.
    Kernel,
    /// The documented ones of every service: router 2305, coordinator 2306, node 8075, gateway 8080, geo-receiver 8085,
    /// coordinator's HTTP 8090.
    Documented,
    /// Consecutive ones, from this one on.
    From(u16),
}

/// Hands out ports, one by one.
#[derive(Debug)]
pub(crate) struct PortPlan {
    ports: Ports,
    next: u16,
}

/// What a port is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// A service's main listener.
    Main(Kind),
    /// The coordinator's HTTP.
    CoordinatorHttp,
}

impl PortPlan {
    pub(crate) fn new(ports: Ports) -> Self {
        let next = if let Ports::From(base) = ports { base } else { 0 };
        Self { ports, next }
    }

    /// The port for the `index`th (from 0) process of its kind at the `site`th (from 0) site; 0 leaves it to the kernel.
    pub(crate) fn port(&mut self, site: u16, purpose: Purpose, index: u16) -> u16 {
        match self.ports {
            Ports::Kernel => 0,
            Ports::From(_) => {
                let port = self.next;
                self.next = self.next.checked_add(1).unwrap_or(0);
                port
            }
            Ports::Documented => match purpose {
                // Gateways are what people see: 8080 here, 8081 there.
                Purpose::Main(Kind::Gateway) => 8080 + site + 2 * index,
                Purpose::Main(Kind::Router) => 2305 + 100 * site + 10 * index,
                Purpose::Main(Kind::Coordinator) => 2306 + 100 * site + 10 * index,
                Purpose::Main(Kind::Node) => 8075 + 100 * site + index,
                Purpose::Main(Kind::GeoReceiver) => 8085 + 100 * site,
                Purpose::CoordinatorHttp => 8090 + 100 * site + index,
                Purpose::Main(Kind::Replicator) => 0,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn all(ports: Ports) -> Vec<u16> {
        let mut plan = PortPlan::new(ports);
        let mut given = Vec::new();
        for site in 0..2 {
            for index in 0..2 {
                for kind in [Kind::Router, Kind::Coordinator, Kind::Gateway] {
                    given.push(plan.port(site, Purpose::Main(kind), index));
                }
                given.push(plan.port(site, Purpose::CoordinatorHttp, index));
            }
            for index in 0..5 {
                given.push(plan.port(site, Purpose::Main(Kind::Node), index));
            }
            given.push(plan.port(site, Purpose::Main(Kind::GeoReceiver), 0));
        }
        given
    }

    #[test]
    fn no_port_is_given_twice() {
        for ports in [Ports::Documented, Ports::From(4000)] {
            let given = all(ports);
            assert_eq!(given.iter().collect::<HashSet<_>>().len(), given.len(), "{given:?}");
        }
        assert!(all(Ports::Kernel).iter().all(|port| *port == 0));
    }

    #[test]
    fn the_documented_ports_are_those_of_gitaly_and_praefect() {
        let mut plan = PortPlan::new(Ports::Documented);
        assert_eq!(plan.port(0, Purpose::Main(Kind::Router), 0), 2305);
        assert_eq!(plan.port(0, Purpose::Main(Kind::Node), 0), 8075);
        assert_eq!(plan.port(1, Purpose::Main(Kind::Gateway), 0), 8081);
    }
}
