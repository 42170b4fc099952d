//! The table of the requests of the control API: what carries each of them out, and what there is to say of it. Both the router and
//! the description ([`super::openapi`]) are made of it, so that no request lacks either.

use axum::{
    Router,
    body::Bytes,
    extract::DefaultBodyLimit,
    handler::Handler,
    http::header::CONTENT_TYPE,
    routing::{self, MethodRouter},
};
use schemars::{JsonSchema, Schema, SchemaGenerator};

use super::{
    openapi,
    server::{
        EVENTS, EXPLAIN, add_prefixes, add_service, apply, confirm, drain, drains, events, explain, live, prefixes,
        progress, reload, remove_prefixes, remove_service, services, status, take_over, undrain,
    },
};
use crate::{
    api::{self, MAX_FILE, ProblemKind},
    engine::Shared,
    rules::ServiceName,
    service::ServiceConfig,
};

/// Where the description is.
pub(super) const DESCRIPTION: &str = "/v1/openapi.json";

/// Says what the JSON of a type is like.
pub(super) type Shape = fn(&mut SchemaGenerator) -> Schema;

/// A request.
pub(super) struct Route {
    pub(super) path: &'static str,
    /// As descriptions write it.
    pub(super) method: &'static str,
    pub(super) summary: &'static str,
    handler: MethodRouter<Shared>,
    /// The part of the path in braces.
    pub(super) name: Option<Shape>,
    pub(super) query: Option<Shape>,
    pub(super) body: Option<Content>,
    pub(super) answer: Option<Content>,
    /// What it may end with beside what any request may end with.
    pub(super) problems: &'static [ProblemKind],
}

/// What a body is like.
#[derive(Clone, Copy, Debug)]
pub(super) enum Content {
    /// JSON.
    Json(Shape),
    /// Lines of JSON.
    Lines(Shape),
    /// A text.
    Text,
}

impl Route {
    fn get<T: 'static>(path: &'static str, handler: impl Handler<T, Shared>, summary: &'static str) -> Self {
        Self::new(path, "get", routing::get(handler), summary)
    }

    fn post<T: 'static>(path: &'static str, handler: impl Handler<T, Shared>, summary: &'static str) -> Self {
        Self::new(path, "post", routing::post(handler), summary)
    }

    fn delete<T: 'static>(path: &'static str, handler: impl Handler<T, Shared>, summary: &'static str) -> Self {
        Self::new(path, "delete", routing::delete(handler), summary)
    }

    fn new(path: &'static str, method: &'static str, handler: MethodRouter<Shared>, summary: &'static str) -> Self {
        Self { path, method, summary, handler, name: None, query: None, body: None, answer: None, problems: &[] }
    }

    fn name<T: JsonSchema>(self) -> Self {
        Self { name: Some(SchemaGenerator::subschema_for::<T>), ..self }
    }

    fn query<T: JsonSchema>(self) -> Self {
        Self { query: Some(T::json_schema), ..self }
    }

    fn body<T: JsonSchema>(self) -> Self {
        Self { body: Some(Content::Json(SchemaGenerator::subschema_for::<T>)), ..self }
    }

    /// The body is a file as it is, of up to so many bytes.
    fn file(self, limit: usize) -> Self {
        Self { handler: self.handler.layer(DefaultBodyLimit::max(limit)), body: Some(Content::Text), ..self }
    }

    fn answer<T: JsonSchema>(self) -> Self {
        Self { answer: Some(Content::Json(SchemaGenerator::subschema_for::<T>)), ..self }
    }

    /// The answer has a line of JSON for each of something.
    fn lines<T: JsonSchema>(self) -> Self {
        Self { answer: Some(Content::Lines(SchemaGenerator::subschema_for::<T>)), ..self }
    }

    fn problems(self, problems: &'static [ProblemKind]) -> Self {
        Self { problems, ..self }
    }

    /// Whether it changes something: it may have an id then, so that it is done once.
    pub(super) fn is_command(&self) -> bool {
        self.method != "get"
    }
}

/// Carries the requests out, and says what they are.
pub(super) fn router() -> Router<Shared> {
    let routes = all();
    let description = Bytes::from(openapi::description(&routes));
    let describe = || async { ([(CONTENT_TYPE, "application/json")], description) };
    let router = Router::new().route(DESCRIPTION, routing::get(describe));
    routes.into_iter().fold(router, |router, route| router.route(route.path, route.handler))
}

/// All requests but that for the description itself.
pub(super) fn all() -> Vec<Route> {
    use ProblemKind::{Conflict, NotFound, Unsafe};
    vec![
        Route::get("/v1/status", status, "The back end, totals, and what is degraded").answer::<api::StatusView>(),
        Route::get("/v1/live", live, "Counts and rates by service and prefix").answer::<api::LiveView>(),
        Route::get("/v1/prefixes", prefixes, "The rules in order of precedence")
            .query::<api::ListPrefixes>()
            .answer::<Vec<api::PrefixView<'_>>>(),
        Route::post("/v1/prefixes", add_prefixes, "Steer prefixes to a service")
            .body::<api::AddPrefixes>()
            .answer::<api::Changed>()
            .problems(&[NotFound, Conflict, Unsafe]),
        Route::delete("/v1/prefixes", remove_prefixes, "Stop steering prefixes")
            .body::<api::RemovePrefixes>()
            .answer::<api::Changed>()
            .problems(&[NotFound, Conflict]),
        Route::post("/v1/apply", apply, "Make the applied rules equal to a file")
            .query::<api::Apply>()
            .file(MAX_FILE)
            .answer::<api::Applied>()
            .problems(&[NotFound, Conflict, Unsafe]),
        Route::post("/v1/confirm", confirm, "Keep what was applied to be confirmed")
            .answer::<api::Changed>()
            .problems(&[NotFound]),
        Route::get("/v1/drain", drains, "What is drained, with its connections").answer::<Vec<api::DrainView>>(),
        Route::post("/v1/drain", drain, "Take this node out of service, or a part of it")
            .body::<api::DrainRequest>()
            .answer::<Vec<api::DrainView>>()
            .problems(&[NotFound]),
        Route::delete("/v1/drain", undrain, "End a drain")
            .body::<api::Undrain>()
            .answer::<api::Changed>()
            .problems(&[NotFound]),
        Route::post("/v1/reload", reload, "Read the configuration file again")
            .query::<api::Reload>()
            .answer::<api::Reloaded>()
            .problems(&[NotFound, Conflict, Unsafe]),
        Route::get("/v1/progress", progress, "What a long command is doing").answer::<api::ProgressView>(),
        Route::get(EVENTS, events, "Connections and flows as they begin, and changes, until the client goes")
            .query::<api::Listen>()
            .lines::<api::EventLine>()
            .problems(&[NotFound]),
        Route::get(EXPLAIN, explain, "What becomes of a packet, and why")
            .query::<api::Explain>()
            .answer::<api::Explanation>()
            .problems(&[NotFound]),
        Route::post("/v1/takeover", take_over, "Have another program serve from now on, as root alone may")
            .body::<api::TakeOver>()
            .answer::<api::Taken>(),
        Route::get("/v1/services", services, "The services with their sockets and counters")
            .answer::<Vec<api::ServiceView>>(),
        Route::post("/v1/services", add_service, "Open a service")
            .body::<ServiceConfig>()
            .answer::<api::Changed>()
            .problems(&[Conflict]),
        Route::delete("/v1/services/{name}", remove_service, "Close a service that no rule steers to")
            .name::<ServiceName>()
            .answer::<api::Changed>()
            .problems(&[NotFound, Conflict]),
    ]
}
