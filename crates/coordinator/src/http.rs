//! Health and counters over plain HTTP, for those who do not speak gRPC. It says nothing secret, and changes nothing.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use tokio::{net::TcpListener, task::JoinHandle};

use crate::{
    shell::Handle,
    telemetry::{Snapshot, Telemetry},
};

#[derive(Clone)]
struct Shared {
    handle: Handle,
    telemetry: Arc<Telemetry>,
}

/// Serves `/livez` (the coordinator decides), `/healthz` (and all ranks of all backbones are ready) and `/metrics` at `address`.
///
/// # Errors
/// If it is taken.
pub(crate) async fn serve(
    address: SocketAddr,
    handle: Handle,
    telemetry: Arc<Telemetry>,
) -> std::io::Result<(SocketAddr, JoinHandle<()>)> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    let routes = Router::new()
        .route("/livez", get(livez))
        .route("/healthz", get(healthz))
        .route("/metrics", get(metrics))
        .with_state(Shared { handle, telemetry });
    let task = tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, routes).await {
            tracing::error!("the endpoint for health and metrics ended: {error}");
        }
    });
    Ok((address, task))
}

async fn snapshot(shared: &Shared) -> Result<Snapshot, (StatusCode, String)> {
    let seen = shared.handle.read(|core, _| Snapshot::of(core.rows())).await;
    seen.map_err(|problem| (StatusCode::SERVICE_UNAVAILABLE, format!("{problem}\n")))
}

async fn livez(State(shared): State<Shared>) -> impl IntoResponse {
    let alive = shared.handle.read(|_, _| ()).await;
    alive.map(|()| "ok\n").map_err(|problem| (StatusCode::SERVICE_UNAVAILABLE, format!("{problem}\n")))
}

async fn healthz(State(shared): State<Shared>) -> impl IntoResponse {
    let snapshot = snapshot(&shared).await?;
    if snapshot.ills.is_empty() {
        return Ok("ok\n");
    }
    Err((StatusCode::SERVICE_UNAVAILABLE, snapshot.ills.join("\n") + "\n"))
}

async fn metrics(State(shared): State<Shared>) -> impl IntoResponse {
    let snapshot = snapshot(&shared).await?;
    let kind = [(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")];
    Ok::<_, (StatusCode, String)>((kind, shared.telemetry.text(&snapshot)))
}
