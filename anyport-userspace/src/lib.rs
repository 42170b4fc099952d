//! anyport: one Linux socket that answers for every address and every port of whole prefixes.

pub mod api;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod engine;
pub mod host;
pub mod keeper;
pub mod lock;
pub mod register;
pub mod routes;
pub mod rules;
pub mod service;
pub mod steering;
pub mod store;
pub mod sys;
pub mod table;
