//! docs/openapi.json, and what answers have to be like by it.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::http::Response;

/// Methods that an operation can have.
const METHODS: [&str; 6] = ["get", "put", "post", "delete", "patch", "options"];

/// One operation, and a status of its answers.
pub type Case = (String, String, String);

/// The description, and what of it has been seen.
#[derive(Debug)]
pub struct Contract {
    document: Value,
    seen: BTreeSet<Case>,
}

impl Contract {
    /// Reads a description.
    #[must_use]
    pub fn read(text: &[u8]) -> Self {
        Self {
            document: serde_json::from_slice(text).expect("a description in JSON"),
            seen: BTreeSet::new(),
        }
    }

    /// Every path and method.
    #[must_use]
    pub fn operations(&self) -> BTreeSet<(String, String)> {
        let paths = self.document["paths"].as_object().expect("paths");
        let operations = paths.iter().flat_map(|(path, item)| {
            let item = item.as_object().expect("a path's operations");
            let methods = item.keys().filter(|key| METHODS.contains(&key.as_str()));
            methods.map(move |method| (path.clone(), method.clone()))
        });
        operations.collect()
    }

    /// Every status that an operation can answer with, but for those that nobody names.
    #[must_use]
    pub fn cases(&self) -> BTreeSet<Case> {
        let operations = self.operations().into_iter();
        let cases = operations.flat_map(|(path, method)| {
            let responses = &self.document["paths"][&path][&method]["responses"];
            let statuses = responses.as_object().expect("responses").keys();
            let statuses = statuses.filter(|status| *status != "default").cloned();
            statuses
                .map(move |status| (path.clone(), method.clone(), status))
                .collect::<Vec<_>>()
        });
        cases.collect()
    }

    /// Those that no answer was checked against.
    #[must_use]
    pub fn unseen(&self) -> Vec<Case> {
        self.cases().difference(&self.seen).cloned().collect()
    }

    /// Fails the test unless an answer is as the description has it: its status, its type, its
    /// headers and its body.
    pub fn check(&mut self, path: &str, method: &str, response: &Response) {
        let method = method.to_ascii_lowercase();
        let status = response.status.to_string();
        let name = format!("{method} {path}: {status}");
        let responses = &self.document["paths"][path][&method]["responses"];
        let described = responses.get(&status);
        let described = described.unwrap_or_else(|| panic!("{name} is not described"));
        let described = self.resolved(described);
        let kind = response.header("content-type");
        let kind = kind.unwrap_or_else(|| panic!("{name}: no content-type"));
        let content = described["content"].get(kind);
        let content = content.unwrap_or_else(|| panic!("{name}: {kind} is not described"));
        if let Some(headers) = described["headers"].as_object() {
            for header in headers.keys() {
                let value = response.header(&header.to_ascii_lowercase());
                assert!(value.is_some(), "{name}: no {header}");
            }
        }
        if let Some(schema) = content.get("schema") {
            let body = if kind == "application/json" {
                response.json()
            } else {
                String::from_utf8(response.body.clone())
                    .expect("text")
                    .into()
            };
            self.validate(&name, schema, &body);
        }
        self.seen.insert((path.to_owned(), method, status));
    }

    fn resolved<'a>(&'a self, value: &'a Value) -> &'a Value {
        let Some(reference) = value.get("$ref").and_then(Value::as_str) else {
            return value;
        };
        let place = reference.strip_prefix('#').expect("a reference within");
        let found = self.document.pointer(place);
        found.unwrap_or_else(|| panic!("{reference} leads nowhere"))
    }

    fn validate(&self, name: &str, schema: &Value, body: &Value) {
        let schema = json!({
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "components": self.document["components"],
            "allOf": [schema],
        });
        let validator = jsonschema::validator_for(&schema).expect("a schema");
        let errors: Vec<String> = validator
            .iter_errors(body)
            .map(|error| format!("{error} at {}", error.instance_path()))
            .collect();
        assert!(errors.is_empty(), "{name}: {errors:?}: {body:#}");
    }
}
