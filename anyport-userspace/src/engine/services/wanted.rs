//! Which services a file or a configuration wants, and whether its rules steer to services that will be there.

use super::{Running, Services};
use crate::{
    api::{Applied, Problem, ProblemKind},
    engine::difference::at_line,
    rules::{InvalidText, Origin, ServiceName, lines::LineRule},
    service::ServiceConfig,
};

impl Services {
    /// Which services have to be opened and closed, so that those of this origin are these.
    pub(in crate::engine) fn steps(
        &self,
        services: Vec<ServiceConfig>,
        origin: Origin,
        answer: &mut Applied,
    ) -> Result<(Vec<ServiceConfig>, Vec<ServiceName>), Problem> {
        let names: Vec<_> = services.iter().map(|it| it.name.clone()).collect();
        let mut opened = Vec::new();
        for service in services {
            self.expect_enforceable(&service)?;
            let running = self.get(&service.name);
            if running.is_some_and(|running| *running.config() == service) {
                continue;
            }
            // A set is for many nodes, some of which may get their users later.
            if origin != Origin::Fleet {
                let invalid = |error: InvalidText| Problem::new(ProblemKind::Invalid, error.to_string());
                service.expect_owners().map_err(invalid)?;
            }
            match running {
                // The one that is there when nobody has made one of its name.
                Some(running) if running.origin == origin || running.is_preset() => {
                    answer.services.push(format!("~ {}", service.name));
                }
                Some(running) => {
                    let whose = match running.origin {
                        Origin::Config => "in the configuration",
                        Origin::Fleet => "in the fleet's set",
                        Origin::Applied => "applied from a file",
                        Origin::Added | Origin::Host => "added by hand",
                    };
                    return Err(Problem::new(
                        ProblemKind::Conflict,
                        format!("the service {} is {whose} with other settings", service.name),
                    )
                    .hint("use another name, or give both the same settings"));
                }
                None => answer.services.push(format!("+ {}", service.name)),
            }
            opened.push(service);
        }
        let is_gone = |(name, running): &(&ServiceName, &Running)| running.origin == origin && !names.contains(name);
        let mut closed: Vec<_> = self.running.iter().filter(is_gone).map(|(name, _)| name.clone()).collect();
        let preset = ServiceConfig::default_service();
        if closed.contains(&preset.name) {
            // That one is there whenever nobody has made one of its name.
            closed.retain(|name| *name != preset.name);
            answer.services.push(format!("~ {}", preset.name));
            opened.push(preset);
        }
        answer.services.extend(closed.iter().map(|name| format!("- {name}")));
        Ok((opened, closed))
    }

    /// Every rule must steer to a service that will be there.
    pub(in crate::engine) fn expect_for(
        &self,
        rules: &[(LineRule, u32)],
        opened: &[ServiceConfig],
        closed: &[ServiceName],
    ) -> Result<(), Problem> {
        let is_there = |name: &ServiceName| {
            opened.iter().any(|it| it.name == *name) || self.get(name).is_some() && !closed.contains(name)
        };
        let mut last: Option<&ServiceName> = None;
        for ((_, terms), line) in rules {
            if last != Some(&terms.service) && !is_there(&terms.service) {
                return Err(Problem::new(
                    ProblemKind::NotFound,
                    format!("{}there is no service {}", at_line(*line), terms.service),
                )
                .hint(self.hint_at_names()));
            }
            last = Some(&terms.service);
        }
        Ok(())
    }
}
