/**
 * The client of Attolytics for browsers and for Node 18 and newer: sends events, and loses none on the way.
 *
 *     import { Attolytics } from "./attolytics.js";
 *     const events = new Attolytics({ url: "https://events.example.com", app: "com.example.myapp", key: "...",
 *                                     table: "events", always: { platform: "web", version: "1.0" } });
 *     events.send({ event_type: "level_up", score: 7 });
 *
 * An event goes into a queue, and into the storage, when `send` is called; it leaves both when the server has said
 * what became of it: its verdict. Whatever happens in between (a reload, a crash, no network, a server that is
 * down) only delays it.
 *
 * Each tab has a queue of its own in the storage that all of them share: its owner's name is in the keys. A queue
 * whose owner is gone is adopted by another tab, or by the next one. Who lives holds a Web Lock with his name, or,
 * where there are none, renews a time stamp. So no two tabs send the same event.
 *
 * Keys in the storage, after the prefix of the app: `<stamp>-<first owner>.<owner>` is an event as JSON, stamps sort
 * by time; `~<owner>` is a time stamp. No key is written by two tabs, since browsers tell tabs late what others wrote.
 */

/** Requests that outlive their page may have 64 KiB, all of a page together. */
const KEEPALIVE_BYTES_MAX = 60_000;
const KEEPALIVE = "keepalive" in (globalThis.Request?.prototype ?? {});
/** Below it, compression saves less than the preflight costs that it leads to. */
const GZIP_BYTES_MIN = 1_024;
const BACKOFF_MS = 1_000;
const BACKOFF_MS_MAX = 300_000;
/** How often a tab renews its time stamp and looks for queues without an owner. */
const TICK_MS = 20_000;
/** A time stamp that is older belongs to a dead tab. Tabs in the background run their timers once a minute. */
const STALE_MS = 150_000;
/** After this time other tabs see what was written into the storage. */
const SETTLE_MS = 500;

const DEFAULTS = {
  always: {},
  time: "time",
  id: "id",
  waitMs: 2_000,
  batchEvents: 50,
  batchBytes: 32_000,
  queueBytes: 1_000_000,
  timeoutMs: 30_000,
  enabled: true,
};

export class Attolytics {
  /** Bytes of the requests under way that may outlive the page: all clients of a page share the limit. */
  static #aloft = 0;

  #options;
  #endpoint;
  #prefix;
  #storage;
  #locks;

  #enabled = false; // events are taken
  #active = false; // they are sent, too; not so between pagehide and pageshow
  #owner = "";
  #owned = Promise.resolve(); // when the lock with our name is held
  #release = () => {};
  #adopted = Promise.resolve(); // when the queues are here that had no owner at the start
  #ticker;

  /** Events without a verdict, oldest first: { key, stamp, text, bytes, stored, flying, keepalive, handed }. */
  #queue = [];
  #bytes = 0; // of all of them
  #stamp = 0; // of the newest event: microseconds, never the same twice
  #dropped = 0;

  #until = 0; // events up to this stamp are due
  #newEvents = 0; // that are not due yet
  #newBytes = 0;
  #limit; // events per request
  #timer;
  #busy = false; // a request is under way
  #paused = false; // the timer is that of the back-off
  #failures = 0;
  #flights = new Set(); // AbortControllers
  #waiters = []; // for flush(): { until, resolve }
  #told = new Set(); // what was said on the console

  /** @param {import("./attolytics.js").Options} options */
  constructor(options) {
    for (const name of ["url", "app", "key"]) {
      if (typeof options?.[name] !== "string") throw new TypeError(`Attolytics: the option "${name}" is missing`);
    }
    this.#options = { ...DEFAULTS, ...options };
    this.#endpoint = `${options.url.replace(/\/+$/, "")}/apps/${encodeURIComponent(options.app)}/events`;
    this.#prefix = `attolytics ${this.#endpoint} `;
    this.#limit = this.#options.batchEvents;
    // Where storage is forbidden, even its name throws.
    this.#storage = options.storage;
    if (options.storage === undefined) this.#storage = attempt(() => globalThis.document && localStorage);
    this.#locks = attempt(() => navigator.locks);
    this.enabled = this.#options.enabled;
  }

  /**
   * Take an event; it is sent soon. Never throws.
   *
   * @param {object} event its columns
   * @param {string} [table] another table than that of the options
   * @returns {boolean} whether it was taken: not when sending is off, nor what cannot be written as JSON
   */
  send(event = {}, table = this.#options.table) {
    if (!this.#enabled) return false;
    try {
      return this.#accept(event, table);
    } catch (error) {
      attempt(() => this.#warn("an event was dropped:", error));
      return false;
    }
  }

  /**
   * Send what is waiting now. Resolves when all of it has its verdict, however long that takes, or when sending is
   * switched off.
   *
   * @returns {Promise<void>}
   */
  async flush() {
    await this.#adopted;
    const last = this.#queue[this.#queue.length - 1];
    if (!last || !this.#active) return;
    await new Promise((resolve) => {
      this.#waiters.push({ until: last.stamp, resolve });
      this.#timer?.ref?.(); // Somebody waits, so Node must not end.
      this.#pump();
    });
  }

  /** Stop sending and taking events. What has no verdict stays in the storage, for the next client. */
  stop() {
    this.enabled = false;
  }

  /** Throw away all events of this app that are not sent yet, also those of other tabs. */
  forget() {
    this.#flights.forEach((flight) => flight.abort());
    this.#queue = [];
    this.#bytes = 0;
    this.#stored().forEach(({ key }) => this.#erase(key));
    this.#wake();
  }

  /** Whether events are taken and sent. Set it when consent is given, or withdrawn (then `forget`, too). */
  get enabled() {
    return this.#enabled;
  }

  set enabled(enabled) {
    if (enabled === this.#enabled) return;
    this.#enabled = enabled;
    if (enabled) this.#start();
    else this.#end();
    for (const [type, listener] of Object.entries(this.#listeners)) {
      globalThis[enabled ? "addEventListener" : "removeEventListener"]?.(type, listener);
    }
    this.#wake();
  }

  /** How many events wait for their verdict. */
  get pending() {
    return this.#queue.length;
  }

  /** How many events were thrown away because the queue was full. */
  get dropped() {
    return this.#dropped;
  }

  // --- Owners -----------------------------------------------------------------------------------------------------

  #listeners = {
    online: () => {
      this.#failures = 0;
      this.#resume();
    },
    visibilitychange: () => {
      if (document.visibilityState === "hidden") this.#leave();
    },
    pagehide: () => {
      this.#leave();
      this.#end(); // A browser does not keep a page with a lock for the way back.
    },
    pageshow: (event) => {
      if (event.persisted) this.#start();
    },
  };

  #start() {
    this.#active = true;
    // What is in the storage is adopted below, by us or by others; what was handed over counts as sent.
    this.#setQueue(this.#queue.filter((event) => !event.stored && !event.handed));
    this.#owner = uuid().slice(-12);
    const gone = new Promise((resolve) => (this.#release = resolve));
    this.#beat();
    this.#owned = new Promise((resolve) => {
      if (!this.#storage || !this.#locks) return resolve();
      const live = () => {
        resolve();
        return gone;
      };
      this.#locks.request(this.#prefix + this.#owner, live).catch(() => {
        this.#locks = null; // forbidden here
        this.#beat();
        resolve();
      });
    });
    this.#ticker = setInterval(() => {
      this.#beat();
      this.#adopt();
    }, TICK_MS);
    this.#ticker.unref?.();
    this.#adopted = this.#adopt();
    this.#pump();
  }

  #end() {
    this.#active = this.#paused = false;
    clearInterval(this.#ticker);
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#erase(this.#prefix + "~" + this.#owner);
    this.#release();
  }

  #beat() {
    if (!this.#locks) this.#write(this.#prefix + "~" + this.#owner, Date.now());
  }

  /** Take over the queues whose owners are gone. */
  async #adopt() {
    const owners = new Set(this.#stored().map(({ owner }) => owner));
    owners.delete(this.#owner);
    await Promise.all([...owners].map((owner) => this.#claim(owner, this.#owner)));
  }

  /** Take over a queue if its owner is gone. */
  async #claim(owner, me) {
    const inherit = () => this.#active && this.#owner === me && this.#inherit(owner);
    if (this.#locks) {
      return new Promise((resolve) => {
        const asked = this.#locks.request(this.#prefix + owner, { ifAvailable: true }, async (lock) => {
          if (!lock) return;
          await sleep(SETTLE_MS); // What it wrote last comes in.
          inherit();
          resolve();
          await sleep(SETTLE_MS); // Others see that it has nothing left before they may ask.
        });
        asked.catch(() => {}).then(resolve);
      });
    }
    const key = `${this.#prefix}~${owner}`;
    const mark = this.#read(key);
    if (mark?.includes(" ")) {
      await sleep(2 * SETTLE_MS); // Somebody claims it, or has gone while he did.
      if (this.#read(key) !== mark) return;
    } else if (Math.abs(Date.now() - parseInt(mark)) < STALE_MS) return;
    // Two that do this at once see who wrote last.
    const claim = `${Date.now()} ${me}`;
    this.#write(key, claim);
    await sleep(SETTLE_MS);
    if (this.#read(key) !== claim) return;
    inherit();
    this.#erase(key);
  }

  #inherit(owner) {
    for (const { key, name, stamp } of this.#stored().filter((stored) => stored.owner === owner)) {
      const text = this.#read(key);
      if (text == null) continue;
      const isEvent = attempt(() => JSON.parse(text)?._t) !== undefined && Number.isSafeInteger(stamp);
      const event = isEvent && this.#add(stamp, text, name);
      this.#erase(key);
      if (!event) this.#warn("something in the storage is not an event, and was removed");
      else if (!event.stored) this.#keep(event); // There is room now.
    }
    this.#queue.sort((a, b) => a.stamp - b.stamp);
    this.#trim();
    this.#pump();
  }

  // --- The queue --------------------------------------------------------------------------------------------------

  #accept(columns, table) {
    if (typeof columns !== "object" || !columns || Array.isArray(columns)) throw new TypeError("not an object");
    const { always, time, id } = this.#options;
    const text = JSON.stringify({
      _t: table,
      ...(time && { [time]: Date.now() / 1000 }),
      ...(id && { [id]: uuid() }),
      ...always,
      ...columns,
    });
    if (length(text) > this.#options.queueBytes) throw new RangeError("larger than the queue");
    const { bytes } = this.#add(Math.max(this.#stamp + 1, Date.now() * 1000), text);
    this.#trim();
    this.#newEvents += 1;
    this.#newBytes += bytes;
    if (this.#newEvents >= this.#options.batchEvents || this.#newBytes >= this.#options.batchBytes) this.#pump();
    else if (this.#active) this.#timer ??= setTimeout(() => this.#pump(), this.#options.waitMs);
    return true;
  }

  /** Add an event to the queue; the name is that in the storage of another owner. */
  #add(stamp, text, name = `${stamp.toString(36).padStart(11, "0")}-${this.#owner}`) {
    const key = `${this.#prefix}${name}.${this.#owner}`;
    const event = { key, stamp, text, bytes: length(text) };
    this.#keep(event);
    this.#queue.push(event);
    this.#bytes += event.bytes;
    this.#stamp = Math.max(this.#stamp, stamp);
    return event;
  }

  /** Put an event into the storage. Without room there, it is only in memory. */
  #keep(event) {
    event.stored = this.#write(event.key, event.text);
    event.handed = false;
  }

  #remove(events) {
    const gone = new Set(events);
    this.#setQueue(this.#queue.filter((event) => !gone.has(event)));
    gone.forEach((event) => event.stored && this.#erase(event.key));
  }

  #setQueue(queue) {
    this.#queue = queue;
    this.#bytes = sum(queue);
  }

  /** Drop the oldest events until the others fit. */
  #trim() {
    let excess = this.#bytes - this.#options.queueBytes;
    if (excess <= 0) return;
    const dropped = [];
    for (const event of this.#queue.slice(0, -1)) {
      if (event.flying || excess <= 0) continue;
      dropped.push(event);
      excess -= event.bytes;
    }
    this.#dropped += dropped.length;
    this.#remove(dropped);
    this.#warn("the queue is full, the oldest events are dropped");
    this.#wake();
  }

  /** The events in the storage, whoever owns them. */
  #stored() {
    const keys = attempt(() => Array.from({ length: this.#storage.length }, (_, i) => this.#storage.key(i))) ?? [];
    return keys.flatMap((key) => {
      const rest = key?.startsWith(this.#prefix) ? key.slice(this.#prefix.length) : "";
      const [, name, stamp, owner] = /^((\w+)-\w+)\.(\w+)$/.exec(rest) ?? [];
      return owner ? { key, name, owner, stamp: parseInt(stamp, 36) } : [];
    });
  }

  // A storage may be missing, full, forbidden or broken at any time.

  #read(key) {
    return attempt(() => this.#storage.getItem(key));
  }

  #write(key, text) {
    return attempt(() => this.#storage.setItem(key, text) ?? true) ?? false;
  }

  #erase(key) {
    attempt(() => this.#storage.removeItem(key));
  }

  // --- Sending ----------------------------------------------------------------------------------------------------

  /** Send all that is in the queue now, one request at a time. */
  async #pump() {
    this.#until = this.#stamp;
    this.#newEvents = this.#newBytes = 0;
    if (this.#paused) return;
    clearTimeout(this.#timer);
    this.#timer = undefined;
    if (this.#busy) return;
    this.#busy = true;
    await this.#owned;
    while (this.#active && !this.#paused) {
      const batch = this.#take(this.#limit, this.#options.batchBytes, this.#until);
      if (!batch.length) break;
      await this.#deliver(batch, false);
    }
    this.#busy = false;
    this.#wake();
  }

  /** Take the oldest events that nobody is sending, as many as a request may have, but one in any case. */
  #take(count, bytes, until = Infinity) {
    const batch = [];
    const gone = [];
    for (const event of this.#queue) {
      if (event.flying) continue;
      if (event.stamp > until || batch.length >= count) break;
      // Another tab has forgotten it, or adopted it because we slept.
      if (event.stored && this.#read(event.key) === null) gone.push(event);
      else if ((bytes -= event.bytes + 1) < 0 && batch.length) break;
      else batch.push(event);
    }
    if (gone.length) this.#remove(gone);
    return batch;
  }

  /** The page is left, perhaps for ever: hand over what fits into a request that outlives it. */
  #leave() {
    const { id } = this.#options;
    // Without an id nothing may be sent twice, so what is handed over counts as sent, unless an answer comes all
    // the same. While nobody answers it had better wait for the next visit.
    const hand = (events) =>
      id ||
      events.forEach((event) => {
        this.#erase(event.key);
        event.stored = false;
        event.handed = true;
      });
    if (!this.#active || (!id && this.#failures)) return;
    hand(this.#queue.filter((event) => event.flying && event.keepalive));
    const room = KEEPALIVE_BYTES_MAX - Attolytics.#aloft - length(this.#body([]));
    const batch = this.#take(Infinity, room);
    if (!batch.length || sum(batch) + batch.length > room) return;
    if (KEEPALIVE) {
      this.#deliver(batch, true);
      hand(batch);
    } else if (navigator.sendBeacon?.(this.#endpoint, this.#body(batch)) && !id) this.#remove(batch);
  }

  async #deliver(batch, leaving) {
    batch.forEach((event) => Object.assign(event, { flying: true, keepalive: false }));
    const answer = await this.#post(batch, leaving);
    batch.forEach((event) => (event.flying = false));
    this.#settle(batch, answer);
    if (leaving) this.#pump(); // The page is still there.
  }

  #body(batch) {
    return `{"secret_key":${JSON.stringify(this.#options.key)},"events":[${batch.map(({ text }) => text)}]}`;
  }

  /**
   * Send a batch, and return the answer: without a status if there is none, without a body if it is not the
   * server's own. When leaving, the request is made at once.
   */
  async #post(batch, leaving) {
    const flight = new AbortController();
    const timer = setTimeout(() => flight.abort(), this.#options.timeoutMs);
    // After a failure a request is as plain as can be: it needs no preflight and no room among others.
    const plain = this.#failures > 0;
    let body = this.#body(batch);
    let bytes = length(body);
    let headers = {}; // A string is text/plain, which needs no preflight.
    let aloft = 0;
    this.#flights.add(flight);
    try {
      if (!leaving && !plain && bytes >= GZIP_BYTES_MIN && globalThis.CompressionStream) {
        const zipped = await gzip(body);
        if (zipped.byteLength < bytes) {
          body = zipped;
          bytes = zipped.byteLength;
          headers = { "Content-Encoding": "gzip" };
        }
      }
      const keepalive = KEEPALIVE && (leaving || !plain) && Attolytics.#aloft + bytes <= KEEPALIVE_BYTES_MAX;
      batch.forEach((event) => (event.keepalive = keepalive));
      if (keepalive) Attolytics.#aloft += aloft = bytes;
      const response = await fetch(this.#endpoint, {
        method: "POST",
        body,
        headers,
        keepalive,
        credentials: "omit",
        redirect: "error", // The network's log-in page must not be taken for the server.
        signal: flight.signal,
      });
      const after = response.headers.get("Retry-After");
      return {
        status: response.status,
        retryMs: (/^\d+$/.test(after) ? after * 1000 : Date.parse(after) - Date.now()) || 0,
        body: await response.json().catch(() => null),
      };
    } catch {
      return {};
    } finally {
      clearTimeout(timer);
      Attolytics.#aloft -= aloft;
      this.#flights.delete(flight);
    }
  }

  // --- Verdicts ---------------------------------------------------------------------------------------------------

  #settle(sent, { status, retryMs = 0, body }) {
    const batch = sent.filter((event) => this.#queue.includes(event)); // The others are forgotten.
    const later = !status || status >= 500 || status === 408 || status === 429;
    const own = body && typeof body === "object"; // Attolytics explains itself in JSON; a proxy may say 413, too.
    if (own && status === 200) {
      this.#failures = 0;
      this.#limit = Math.min(this.#limit * 2, this.#options.batchEvents);
      this.#remove(sent);
      for (const warning of list(body.warnings)) this.#warn(String(warning).replace(/^events\[\d+\]: /, ""));
      for (const problem of list(body.quarantined)) this.#warn("quarantined:", describe(problem));
    } else if (!batch.length) {
      // There is nothing left to decide.
    } else if (!later && (status === 413 || (own && status >= 400))) {
      this.#failures = 0;
      this.#refuse(sent, batch, status, body ?? {});
    } else {
      if (!later) this.#warn(`the answer, with status ${status}, is not from Attolytics`);
      this.#pause(retryMs);
    }
    // What was handed over is ours again.
    batch.forEach((event) => event.handed && this.#queue.includes(event) && this.#keep(event));
    this.#wake();
  }

  /** Drop the events that are named, or else make the batch smaller, or else drop all of it. */
  #refuse(sent, batch, status, { error = `status ${status}`, events }) {
    const problems = list(events);
    const named = new Set(problems.map(({ index }) => sent[index]).filter((event) => batch.includes(event)));
    if (!named.size && batch.length > 1 && (status === 413 || status === 400)) {
      this.#limit = Math.min(this.#limit, Math.ceil(batch.length / 2));
      return;
    }
    const refused = named.size ? [...named] : batch;
    const reasons = problems.length ? problems.map(describe) : [error];
    const reason = [...new Set(reasons)].join("; ");
    this.#remove(refused);
    this.#warn("events were refused:", reason);
    try {
      this.#options.onRefused?.(
        refused.map(({ text }) => JSON.parse(text)),
        reason,
      );
    } catch (error) {
      this.#warn("onRefused failed:", error);
    }
  }

  /** Wait before the next request: longer each time, not all clients at the same moment, as long as we are told. */
  #pause(retryMs) {
    if (!this.#active || this.#paused) return;
    const backoff = Math.min(BACKOFF_MS * 2 ** this.#failures, BACKOFF_MS_MAX / 2) * (1 + Math.random());
    this.#failures += 1;
    this.#paused = true;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#resume(), Math.min(Math.max(backoff, retryMs), BACKOFF_MS_MAX));
    if (!this.#waiters.length) this.#timer.unref?.(); // Node may end.
  }

  #resume() {
    this.#paused = false;
    this.#pump();
  }

  /** Tell those who wait for verdicts. */
  #wake() {
    const oldest = this.#enabled && this.#queue.length ? this.#queue[0].stamp : Infinity;
    const done = this.#waiters.filter(({ until }) => until < oldest);
    this.#waiters = this.#waiters.filter(({ until }) => until >= oldest);
    done.forEach(({ resolve }) => resolve());
  }

  #warn(...words) {
    const text = words.join(" ");
    if (this.#told.has(text) || this.#told.size >= 100) return;
    this.#told.add(text);
    console.warn("Attolytics:", ...words);
  }
}

// --- Small things -------------------------------------------------------------------------------------------------

/** Return what the function returns, or undefined if it throws. */
function attempt(action) {
  try {
    return action();
  } catch {
    return undefined;
  }
}

function sleep(ms) {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** The length in UTF-8. */
function length(text) {
  return new TextEncoder().encode(text).length;
}

function sum(events) {
  return events.reduce((total, { bytes }) => total + bytes, 0);
}

/** What the server lists, whatever else a proxy may have put there. */
function list(value) {
  return Array.isArray(value) ? value.filter(Boolean) : [];
}

function describe({ column, reason }) {
  return column ? `${column}: ${reason}` : reason;
}

function gzip(text) {
  const stream = new Blob([text]).stream().pipeThrough(new CompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

/** A random UUID, also where there is no crypto.randomUUID: on pages without TLS and in Node 18. */
function uuid() {
  const { crypto } = globalThis;
  if (crypto?.randomUUID) return crypto.randomUUID();
  const bytes = new Uint8Array(16).map(() => Math.random() * 256);
  crypto?.getRandomValues(bytes);
  bytes[6] = (bytes[6] & 15) | 64;
  bytes[8] = (bytes[8] & 63) | 128;
  const digits = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return digits.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}
