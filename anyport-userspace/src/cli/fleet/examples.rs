//! What one types: examples for the help of the verbs of a fleet and for their manual pages.

pub(super) const PUBLISH: &str = "\
Examples:
  anyportctl fleet publish rules.txt --ring canary --key operator.key
  anyportctl fleet publish rules.txt --ring canary --key operator.key --note 'new customer'";
pub(super) const PROMOTE: &str = "\
Examples:
  anyportctl fleet promote --from canary --to main --key operator.key";
pub(super) const ROLLBACK: &str = "\
Examples:
  anyportctl fleet rollback --ring main --key operator.key";
pub(super) const ROLLOUT: &str = "\
Examples:
  anyportctl fleet rollout rules.txt --rings canary,main --key operator.key";
pub(super) const FLEET_STATUS: &str = "\
Examples:
  anyportctl fleet status
  anyportctl fleet status --watch 5s
  anyportctl fleet status --json";
pub(super) const HISTORY: &str = "\
Examples:
  anyportctl fleet history --ring main";
pub(super) const FORGET: &str = "\
Examples:
  anyportctl fleet forget edge-7 --ring main";
pub(super) const REMOVE: &str = "\
Examples:
  anyportctl fleet remove canary";
