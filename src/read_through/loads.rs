//! The two kinds of loads: a caller's closure, which runs on the caller's task and may borrow; and a
//! shared loader, which runs on a task of its own and outlives its caller.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use futures::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::Loader;
use super::engine::{
    Cache, Engine, Led, Loaded, Query, Settled, Terms, Wanted, lost, out_of_time, too_many,
};
use crate::error::Error;
use crate::executor::{Spawner, until};
use crate::key::Key;
use crate::shutdown::{Work, shut_down};

/// What loads, and where that runs.
pub(crate) struct Loads<F> {
    /// On the caller's task.
    load: F,
    /// On tasks of their own.
    tasks: Option<Tasks>,
}

struct Tasks {
    load: SharedLoad,
    /// Where they run; in the caller's runtime if nothing is said.
    spawner: Option<Spawner>,
}

type SharedLoad = Arc<dyn Fn(Vec<Key>) -> BoxFuture<'static, Loaded> + Send + Sync>;

impl<F> Loads<F> {
    /// A caller's closure.
    pub(crate) fn of_caller(load: F) -> Self {
        Self { load, tasks: None }
    }
}

/// A shared loader.
pub(crate) fn shared<L: Loader>(
    loader: Arc<L>,
    spawner: Option<Spawner>,
) -> Loads<impl FnMut(Vec<Key>) -> BoxFuture<'static, Loaded>> {
    let load = move |keys| -> BoxFuture<'static, Loaded> { Box::pin(load(loader.clone(), keys)) };
    let load: SharedLoad = Arc::new(load);
    let tasks = Tasks {
        load: load.clone(),
        spawner,
    };
    Loads {
        load: move |keys| load(keys),
        tasks: Some(tasks),
    }
}

async fn load<L: Loader>(loader: Arc<L>, keys: Vec<Key>) -> Loaded {
    if let [key] = &keys[..] {
        let loaded = loader.load(key).await?;
        let loaded = loaded.map(|payload| (key.clone(), payload));
        return Ok(HashMap::from_iter(loaded));
    }
    loader.load_many(&keys).await
}

impl<F, Fut> Loads<F>
where
    F: FnMut(Vec<Key>) -> Fut,
    Fut: Future<Output = Loaded>,
{
    /// Leads flights to their end, or until the caller's time is up.
    pub(super) async fn lead<S: Cache>(
        &mut self,
        engine: &Arc<Engine>,
        query: &Query<S>,
        led: Vec<Led>,
        terms: Terms,
    ) -> Vec<Settled> {
        let wanted: Vec<_> = led.iter().map(Led::wanted).collect();
        let task = match self.spawn(engine, query, led, terms) {
            Ok(Some(task)) => task,
            Ok(None) => return all_fail(wanted, &too_many()),
            Err(led) => return engine.lead(query, led, terms, &mut self.load).await,
        };
        match until(engine.spawner(), terms.ends, task).await {
            Ok(Some(Ok(settled))) => settled,
            Ok(None) => all_fail(wanted, &out_of_time()),
            // Its runtime is gone.
            Ok(Some(Err(_))) => all_fail(wanted, &lost()),
            Err(error) => all_fail(wanted, &error),
        }
    }

    /// The same for values that there are old ones of: they are given at once if that can be done.
    pub(super) async fn refresh<S: Cache>(
        &mut self,
        engine: &Arc<Engine>,
        query: &Query<S>,
        led: Vec<Led>,
        terms: Terms,
    ) -> Vec<Settled> {
        let wanted: Vec<_> = led.iter().map(Led::wanted).collect();
        match self.spawn(engine, query, led, terms) {
            Ok(_behind_the_answer) => all_fail(wanted, &out_of_time()),
            Err(led) => engine.lead(query, led, terms, &mut self.load).await,
        }
    }

    /// Leads on a task, where that can be: what it loads is put back even if the caller's time is up
    /// before. `None` if there are as many such tasks as may be.
    fn spawn<S: Cache>(
        &self,
        engine: &Arc<Engine>,
        query: &Query<S>,
        led: Vec<Led>,
        terms: Terms,
    ) -> Result<Option<JoinHandle<Vec<Settled>>>, Vec<Led>> {
        let Some(tasks) = &self.tasks else {
            return Err(led);
        };
        let runtime = match &tasks.spawner {
            Some(spawner) => spawner.handle().ok().cloned(),
            None => Handle::try_current().ok(),
        };
        let Some(runtime) = runtime else {
            return Err(led);
        };
        let Some(permit) = engine.begin_task() else {
            return Ok(None);
        };
        let (engine, query, load) = (engine.clone(), query.clone(), tasks.load.clone());
        let terms = Terms {
            ends: engine.load_ends(),
            on_task: true,
            ..terms
        };
        let counted = engine.tracker().count(Work::Load);
        Ok(Some(runtime.spawn(async move {
            let _permit = permit;
            let wanted: Vec<_> = led.iter().map(Led::wanted).collect();
            let mut load = |keys| load(keys);
            let leading = engine.lead(&query, led, terms, &mut load);
            let settled = engine.tracker().unless_closed(leading).await;
            drop(counted);
            settled.unwrap_or_else(|| all_fail(wanted, &shut_down()))
        })))
    }
}

/// Each gets what it falls back on, if it does.
pub(super) fn all_fail(wanted: Vec<Wanted>, error: &Error) -> Vec<Settled> {
    let conclude = |wanted: Wanted| wanted.conclude(Err(error.clone()));
    wanted.into_iter().map(conclude).collect()
}
