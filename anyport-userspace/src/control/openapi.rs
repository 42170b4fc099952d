//! The description of the control API by `OpenAPI` 3.1, made of the table of requests and of the types that these read and write.

use schemars::{Schema, SchemaGenerator, generate::SchemaSettings, transform::RecursiveTransform};
use serde_json::{Map, Value, json};

use super::{
    outcomes::LONGEST_ID,
    requests::{Content, DESCRIPTION, Route},
};
use crate::api::{FIRST_HEADER, ID_HEADER, Problem, ProblemKind};

/// Where schemas stand in it.
const SCHEMAS: &str = "/components/schemas";

const ABOUT: &str = "Root, the daemon's own user and the members of the group anyport may use all of it; the group of readers \
                     may GET all but events. HEAD is answered as GET is, without the body. docs/api.md says more.";

/// How requests end that are not carried out, and what that means.
const PROBLEMS: [(ProblemKind, &str); 8] = [
    (ProblemKind::Invalid, "The request makes no sense"),
    (ProblemKind::NotPermitted, "The client may not do this"),
    (ProblemKind::NotFound, "What the request names is not there"),
    (ProblemKind::Conflict, "The request contradicts what is there"),
    (ProblemKind::TooLarge, "The body is larger than it may be"),
    (ProblemKind::Unsafe, "Refused for safety; force=true does it anyway"),
    (ProblemKind::Failed, "It was tried and did not work"),
    (ProblemKind::Stopping, "Nothing was tried: the daemon stops, or there are too many requests; ask again"),
];

/// All that can be asked for.
pub(super) fn description(routes: &[Route]) -> String {
    // As Rust's documents refer to items.
    document(routes).to_string().replace("[`", "`").replace("`]", "`")
}

fn document(routes: &[Route]) -> Value {
    let mut shapes = Shapes::new();
    let mut paths = Map::new();
    for route in routes {
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        path[route.method] = shapes.operation(route);
    }
    paths.insert(
        DESCRIPTION.into(),
        json!({"get": {
            "operationId": "get_openapi_json",
            "summary": "This description",
            "responses": responses(&json!({"application/json": {"schema": {"type": "object"}}}), |kind| {
                matches!(kind, ProblemKind::NotPermitted | ProblemKind::Stopping)
            }),
        }}),
    );
    let problem = json!({"application/json": {"schema": shapes.answered.subschema_for::<Problem>()}});
    let problems = PROBLEMS
        .map(|(kind, meaning)| (format!("{kind:?}"), json!({"description": meaning, "content": problem.clone()})));
    json!({
        "openapi": "3.1.0",
        "info": {"title": "Control API of anyportd", "version": env!("CARGO_PKG_VERSION"), "description": ABOUT},
        "servers": [{"url": "http://anyport", "description": "The control socket, by any name"}],
        "paths": paths,
        "components": {"schemas": shapes.into_schemas(), "responses": Map::from_iter(problems)},
    })
}

/// Makes the schemas of types, which all stand in one place. What may be left out of a request differs from what may be left out of
/// an answer.
struct Shapes {
    asked: SchemaGenerator,
    answered: SchemaGenerator,
}

impl Shapes {
    fn new() -> Self {
        let settings = || {
            SchemaSettings::draft2020_12().with(|it| {
                it.definitions_path = SCHEMAS.into();
                it.meta_schema = None;
            })
        };
        Self {
            asked: settings().for_deserialize().into_generator(),
            answered: settings().for_serialize().with_transform(RecursiveTransform(never_null)).into_generator(),
        }
    }

    fn into_schemas(mut self) -> Map<String, Value> {
        let mut schemas = self.asked.take_definitions(true);
        schemas.extend(self.answered.take_definitions(true));
        schemas
    }

    fn operation(&mut self, route: &Route) -> Value {
        let mut operation = json!({
            "operationId": id_of(route),
            "summary": route.summary,
            "responses": responses(&content(route.answer, &mut self.answered), |kind| may_end_with(route, kind)),
        });
        let parameters = self.parameters(route);
        if !parameters.is_empty() {
            operation["parameters"] = parameters.into();
        }
        if route.body.is_some() {
            operation["requestBody"] = json!({"required": true, "content": content(route.body, &mut self.asked)});
        }
        operation
    }

    fn parameters(&mut self, route: &Route) -> Vec<Value> {
        let mut parameters = Vec::new();
        let in_braces = |part: &'static str| part.strip_prefix('{')?.strip_suffix('}');
        for (name, shape) in route.path.split('/').filter_map(in_braces).zip(route.name) {
            parameters.push(json!({"name": name, "in": "path", "required": true, "schema": shape(&mut self.asked)}));
        }
        if let Some(query) = route.query {
            parameters.extend(parts(&query(&mut self.asked)));
        }
        if route.is_command() {
            parameters.extend([
                json!({
                    "name": ID_HEADER, "in": "header", "schema": {"type": "string", "minLength": 1, "maxLength": LONGEST_ID},
                    "description": "Names this command: asked for again, it is answered as before and not done twice",
                }),
                json!({
                    "name": FIRST_HEADER, "in": "header", "schema": {"type": "integer", "minimum": 0, "maximum": u64::MAX},
                    "description": "When it was asked for first: milliseconds since the host was started (CLOCK_BOOTTIME)",
                }),
            ]);
        }
        parameters
    }
}

/// Such as `delete_services_name`.
fn id_of(route: &Route) -> String {
    let words = route.path.split(|it: char| !it.is_ascii_alphanumeric()).filter(|it| !it.is_empty() && *it != "v1");
    [route.method].into_iter().chain(words).collect::<Vec<_>>().join("_")
}

/// Whether a request can end so.
fn may_end_with(route: &Route, kind: ProblemKind) -> bool {
    match kind {
        ProblemKind::NotPermitted | ProblemKind::Failed | ProblemKind::Stopping => true,
        ProblemKind::Invalid => route.is_command() || route.query.is_some(),
        ProblemKind::TooLarge => route.body.is_some(),
        kind => route.problems.contains(&kind),
    }
}

fn responses(content: &Value, may_end_with: impl Fn(ProblemKind) -> bool) -> Value {
    let problems = PROBLEMS.into_iter().filter(|(kind, _)| may_end_with(*kind));
    let problems = problems
        .map(|(kind, _)| (kind.http_status().to_string(), json!({"$ref": format!("#/components/responses/{kind:?}")})));
    let done = ("200".to_owned(), json!({"description": "Done", "content": content}));
    Value::Object([done].into_iter().chain(problems).collect())
}

fn content(content: Option<Content>, shapes: &mut SchemaGenerator) -> Value {
    match content {
        None => json!({}),
        Some(Content::Json(shape)) => json!({"application/json": {"schema": shape(shapes)}}),
        Some(Content::Lines(shape)) => json!({"application/x-ndjson": {"schema": {
            "type": "array",
            "items": shape(shapes),
            "description": "A line for each item; empty lines mean nothing, and the first comes at once",
        }}}),
        Some(Content::Text) => json!({"text/plain": {"schema": {"type": "string"}}}),
    }
}

/// The parts of a query, by the schema of all of it.
fn parts(query: &Schema) -> Vec<Value> {
    let required = query.get("required").and_then(Value::as_array).cloned().unwrap_or_default();
    let properties = query.get("properties").and_then(Value::as_object).cloned().unwrap_or_default();
    let part = |(name, mut schema): (String, Value)| {
        let is_required = required.iter().any(|it| *it == name);
        without_null(&mut schema);
        json!({"name": name, "in": "query", "required": is_required, "schema": schema})
    };
    properties.into_iter().map(part).collect()
}

/// What an answer may leave out is never null in it.
fn never_null(schema: &mut Schema) {
    let required = schema.get("required").cloned().unwrap_or_default();
    let is_required = |name: &str| required.as_array().is_some_and(|all| all.iter().any(|it| it == name));
    let properties = schema.get_mut("properties").and_then(Value::as_object_mut);
    for (_, schema) in properties.into_iter().flatten().filter(|(name, _)| !is_required(name)) {
        without_null(schema);
    }
}

/// In a query what is not there is left out: nothing stands for it.
fn without_null(schema: &mut Value) {
    let Some(schema) = schema.as_object_mut() else { return };
    schema.retain(|name, value| name != "default" || !value.is_null());
    if let Some(kind) = schema.get_mut("type")
        && let Some(other) = kind.as_array().and_then(|kinds| kinds.iter().find(|it| **it != "null")).cloned()
    {
        *kind = other;
    }
    if let Some(Value::Array(choices)) = schema.get_mut("anyOf") {
        choices.retain(|it| it["type"] != "null");
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use serde_json::{Value, json};

    use super::{Shapes, document};
    use crate::control::requests;

    /// Calls `see` with all references.
    fn references<'a>(value: &'a Value, see: &mut impl FnMut(&'a str)) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    match value.as_str().filter(|_| name == "$ref") {
                        Some(reference) => see(reference),
                        None => references(value, see),
                    }
                }
            }
            Value::Array(values) => values.iter().for_each(|value| references(value, see)),
            _ => {}
        }
    }

    #[test]
    fn the_description_is_whole() {
        let routes = requests::all();
        let document = document(&routes);
        let mut seen = BTreeSet::new();
        references(&document, &mut |reference| {
            let pointer = reference.strip_prefix('#').unwrap_or_else(|| panic!("{reference} leads elsewhere"));
            assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
            seen.insert(pointer.rsplit('/').next().unwrap());
        });
        let components = document["components"].as_object().unwrap();
        let all: BTreeSet<_> = components.values().flat_map(|it| it.as_object().unwrap().keys()).collect();
        assert_eq!(seen.iter().copied().collect::<Vec<_>>(), all.iter().map(|it| it.as_str()).collect::<Vec<_>>());
        for route in &routes {
            assert!(route.answer.is_some(), "{} {}", route.method, route.path);
        }
    }

    #[test]
    fn a_query_has_its_parts() {
        let document = document(&requests::all());
        // Nor does an answer have null for what it leaves out.
        let source = &document["components"]["schemas"]["RuleView"]["properties"]["source"];
        assert_eq!(source["anyOf"].as_array().unwrap().len(), 1, "{source}");
        let parameters = document["paths"]["/v1/explain"]["get"]["parameters"].as_array().unwrap();
        let named = |name: &str| parameters.iter().find(|it| it["name"] == name).unwrap();
        assert_eq!((&named("to")["in"], &named("to")["required"]), (&json!("query"), &json!(true)));
        assert_eq!(named("via")["required"], json!(false));
        assert!(!named("via").to_string().contains("null") && !named("from").to_string().contains("null"));
    }

    /// A type that is both asked for and answered must not need two schemas.
    #[test]
    fn a_name_means_one_schema() {
        let mut shapes = Shapes::new();
        for route in requests::all() {
            shapes.operation(&route);
        }
        let answered: BTreeMap<_, _> = shapes.answered.take_definitions(true).into_iter().collect();
        for (name, schema) in shapes.asked.take_definitions(true) {
            assert_eq!(answered.get(&name).unwrap_or(&schema), &schema, "{name}");
        }
    }
}
