//! Whether JSON is what a schema says, by those keywords of JSON Schema that the description of the control API has.

use serde_json::{Map, Value};

/// Keywords that say nothing about values.
const SILENT: [&str; 5] = ["default", "description", "examples", "format", "title"];

/// The schemas of a document.
#[derive(Clone, Copy, Debug)]
pub struct Schemas<'a>(pub &'a Value);

impl<'a> Schemas<'a> {
    /// A schema itself, rather than a reference to it.
    pub fn resolve(self, schema: &'a Value) -> &'a Value {
        schema.get("$ref").map_or(schema, |reference| self.resolve(self.referred(reference)))
    }

    fn referred(self, reference: &Value) -> &'a Value {
        let pointer = reference.as_str().and_then(|it| it.strip_prefix('#'));
        pointer.and_then(|it| self.0.pointer(it)).unwrap_or_else(|| panic!("{reference} leads nowhere"))
    }

    /// Whether a value is what the schema says, and has no field that it does not name.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(self, schema: &'a Value, value: &Value) -> Result<(), String> {
        let Value::Object(schema) = schema else { panic!("no schema: {schema}") };
        schema.iter().try_for_each(|(keyword, of)| self.check_keyword(keyword, of, schema, value))
    }

    fn check_keyword(
        self,
        keyword: &str,
        of: &'a Value,
        schema: &'a Map<String, Value>,
        value: &Value,
    ) -> Result<(), String> {
        let is_right = match keyword {
            "$ref" => return self.check(self.referred(of), value),
            "anyOf" => self.fitting(of, value) > 0,
            "oneOf" => self.fitting(of, value) == 1,
            "type" => has_type(of, value),
            "enum" => of.as_array().is_some_and(|all| all.contains(value)),
            "const" => of == value,
            "minimum" => value.as_f64().is_none_or(|it| it >= number(of)),
            "maximum" => value.as_f64().is_none_or(|it| it <= number(of)),
            "minItems" => value.as_array().is_none_or(|it| of.as_u64().is_some_and(|least| it.len() as u64 >= least)),
            "items" => return value.as_array().into_iter().flatten().try_for_each(|it| self.check(of, it)),
            "required" => {
                let missing =
                    |name: &&Value| value.is_object() && value.get(name.as_str().unwrap_or_default()).is_none();
                match of.as_array().into_iter().flatten().find(missing) {
                    Some(name) => return Err(format!("{name} is missing")),
                    None => true,
                }
            }
            "properties" => return self.check_fields(of, value),
            "additionalProperties" => *of == false && schema.contains_key("properties"),
            keyword => {
                assert!(SILENT.contains(&keyword), "a schema has {keyword}, of which nothing is known here");
                true
            }
        };
        if is_right { Ok(()) } else { Err(format!("{value} is not {keyword} {of}")) }
    }

    fn check_fields(self, properties: &'a Value, value: &Value) -> Result<(), String> {
        value.as_object().into_iter().flatten().try_for_each(|(name, value)| {
            let schema = properties.get(name).ok_or_else(|| format!("{name} is not described"))?;
            self.check(schema, value).map_err(|why| format!("{name}: {why}"))
        })
    }

    fn fitting(self, schemas: &'a Value, value: &Value) -> usize {
        schemas.as_array().into_iter().flatten().filter(|it| self.check(it, value).is_ok()).count()
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn has_type(names: &Value, value: &Value) -> bool {
    let is = |name: &Value| match name.as_str() {
        Some("null") => value.is_null(),
        Some("boolean") => value.is_boolean(),
        Some("integer") => value.is_u64() || value.is_i64(),
        Some("number") => value.is_number(),
        Some("string") => value.is_string(),
        Some("array") => value.is_array(),
        Some("object") => value.is_object(),
        _ => panic!("no type: {name}"),
    };
    names.as_array().map_or_else(|| is(names), |names| names.iter().any(is))
}
