//! Rules as they stand in files and requests.

use std::sync::Arc;

use super::{Origin, Prefix, Rule, RuleSpec};

/// Makes a struct of what rules are about, the fields of their rule spec as they stand in files and requests (where it says
/// `..RuleSpec`), and what else it has.
macro_rules! with_terms {
    (
        $(#[$meta:meta])*
        pub struct $name:ident {
            $(#[$subject_meta:meta])*
            pub $subject:ident: $subject_type:ty,
            ..RuleSpec,
            $(
                $(#[$more_meta:meta])*
                pub $more:ident: $more_type:ty,
            )*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        #[cfg_attr(feature = "daemon", derive(schemars::JsonSchema))]
        #[serde(deny_unknown_fields)]
        pub struct $name {
            $(#[$subject_meta])*
            pub $subject: $subject_type,
            /// The transports.
            #[serde(default)]
            pub protocol: $crate::rules::Protocol,
            /// The destination ports that are steered.
            #[serde(default = "crate::rules::PortSet::all")]
            pub ports: $crate::rules::PortSet,
            /// The destination ports that are left to the host.
            #[serde(default)]
            pub except: $crate::rules::PortSet,
            /// The clients that it is about; all of them if there is none.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub source: Option<$crate::rules::Prefix>,
            /// Who receives what is steered.
            #[serde(default = "crate::rules::ServiceName::default_service")]
            pub service: $crate::rules::ServiceName,
            /// Whether anyport makes the prefix local.
            #[serde(default = "crate::rules::RuleSpec::default_route")]
            pub route: bool,
            $(
                $(#[$more_meta])*
                pub $more: $more_type,
            )*
        }

        impl $name {
            /// Puts the rule spec in.
            pub fn of($subject: $subject_type, terms: $crate::rules::RuleSpec $(, $more: $more_type)*) -> Self {
                let $crate::rules::RuleSpec { protocol, ports, except, source, service, route } = terms;
                Self { $subject, protocol, ports, except, source, service, route $(, $more)* }
            }

            /// Takes the rule spec out.
            pub fn into_terms(self) -> ($subject_type, $crate::rules::RuleSpec) {
                let Self { $subject, protocol, ports, except, source, service, route, .. } = self;
                ($subject, $crate::rules::RuleSpec { protocol, ports, except, source, service, route })
            }
        }
    };
}
pub(crate) use with_terms;

with_terms! {
    /// A rule as it stands under `[[rule]]` in a file, and in the state file.
    pub struct RuleText {
        /// The destination addresses.
        pub prefix: Prefix,
        ..RuleSpec,
    }
}

impl RuleText {
    /// The rule that is meant.
    pub fn into_rule(self, origin: Origin) -> Rule {
        let (prefix, terms) = self.into_terms();
        Rule { prefix, terms: Arc::new(terms), origins: origin.into() }
    }
}

impl From<&Rule> for RuleText {
    fn from(rule: &Rule) -> Self {
        Self::of(rule.prefix, RuleSpec::clone(&rule.terms))
    }
}

#[cfg(test)]
mod tests {
    use super::RuleText;
    use crate::{
        as_text::expect_same_json,
        rules::{PortSet, Prefix, ServiceName},
    };

    #[test]
    fn json_of_values() {
        expect_same_json::<Prefix>(&["192.0.2.0/24", "192.0.2.7/32", "2001:db8::/32", "0.0.0.0/0"]);
        expect_same_json::<PortSet>(&["", "80", "80,443,8000-8999", "1-65535"]);
        expect_same_json::<ServiceName>(&["default", "edge.v4_x-1"]);
    }

    #[test]
    fn json_of_rules() {
        let rest = "\"protocol\":\"both\",\"ports\":\"80,443\",\"except\":\"443\",\"source\":\"198.51.100.0/24\",\
                    \"service\":\"trap\",\"route\":false";
        let rule = format!("{{\"prefix\":\"192.0.2.0/24\",{rest}}}");
        let read: RuleText = serde_json::from_str(&rule).unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), rule);

        let defaults =
            "\"protocol\":\"tcp\",\"ports\":\"1-65535\",\"except\":\"\",\"service\":\"default\",\"route\":true";
        let read: RuleText = serde_json::from_str("{\"prefix\":\"::/0\"}").unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), format!("{{\"prefix\":\"::/0\",{defaults}}}"));
    }
}
