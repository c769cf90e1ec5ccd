/** For the tests: a server that answers as it is told, a storage that breaks, Web Locks, and faster timers. */

import { createServer } from "node:http";
import { gunzipSync } from "node:zlib";

import { Attolytics } from "./attolytics.js";

/** What the server answers: a status, a JSON value or a text, headers, and whether it is late or says nothing. */
export const ok = { status: 200, body: { accepted: 1, stored: "database" } };
export const cut = { cut: true };

export function refusal(status, error, events) {
  return { status, body: { error, events } };
}

/**
 * Start a server. Each request gets the next of the answers (or what a function makes of its events), and those after
 * the last one get 200. Its `requests` are { events, ids, headers, at, body }.
 */
export async function serve(test, ...answers) {
  const requests = [];
  const state = { requests, most: 0, now: 0, answers };
  const server = createServer(async (request, response) => {
    state.most = Math.max(state.most, ++state.now);
    response.on("close", () => (state.now -= 1));
    const chunks = [];
    for await (const chunk of request) chunks.push(chunk);
    const raw = Buffer.concat(chunks);
    const text = (request.headers["content-encoding"] === "gzip" ? gunzipSync(raw) : raw).toString();
    const body = JSON.parse(text);
    const entry = { at: performance.now(), path: request.url, headers: request.headers, bytes: raw.length, body };
    requests.push({ ...entry, events: body.events, numbers: body.events.map((event) => event.n) });
    let answer = state.answers.shift() ?? ok;
    if (typeof answer === "function") answer = answer(body.events);
    if (answer.delayMs) await new Promise((resolve) => setTimeout(resolve, answer.delayMs).unref());
    if (answer.cut) return request.socket.destroy();
    const json = typeof answer.body === "object" ? JSON.stringify(answer.body) : answer.body;
    response.writeHead(answer.status, answer.headers).end(json);
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  test.after(() => {
    server.closeAllConnections();
    server.close();
  });
  state.url = `http://127.0.0.1:${server.address().port}`;
  /** The numbers of all events that came, in order. */
  state.numbers = () => requests.flatMap((request) => request.numbers);
  return state;
}

/** Make a client for the server that stops when the test ends. */
export function client(test, server, options = {}) {
  const url = server.url ?? server;
  const made = new Attolytics({ url, app: "com.example.myapp", key: "key", table: "t", waitMs: 20, ...options });
  test.after(() => made.stop());
  return made;
}

/** A Storage in memory. `fails(method, key)` may throw, as real ones do. */
export class MemoryStorage {
  map = new Map();
  fails = () => {};

  get length() {
    this.fails("length");
    return this.map.size;
  }
  key(index) {
    this.fails("key");
    return [...this.map.keys()][index] ?? null;
  }
  getItem(key) {
    this.fails("getItem", key);
    return this.map.get(key) ?? null;
  }
  setItem(key, value) {
    this.fails("setItem", key);
    this.map.set(key, String(value));
  }
  removeItem(key) {
    this.fails("removeItem", key);
    this.map.delete(key);
  }
  /** The events that are kept, in no order. */
  events() {
    return [...this.map].filter(([key]) => !key.includes(" ~")).map(([, value]) => JSON.parse(value));
  }
  get numbers() {
    return this.events()
      .map((event) => event.n)
      .sort((a, b) => a - b);
  }
}

/** The Web Locks of a browser. Each tab asks through `tab()`, whose `close()` gives up what the tab holds. */
export class Locks {
  #held = new Map();

  tab() {
    const held = this.#held;
    const mine = new Set();
    const free = (name) => {
      mine.delete(name);
      held.delete(name);
    };
    return {
      async request(name, options, callback = options) {
        if (held.has(name)) {
          if (options.ifAvailable) return callback(null);
          throw new Error("no test waits for a lock");
        }
        held.set(name, true);
        mine.add(name);
        try {
          return await callback({ name });
        } finally {
          if (mine.has(name)) free(name);
        }
      },
      close: () => [...mine].forEach(free),
    };
  }
}

const originals = new Map();

/** Put something in the place of a global as long as the test runs. */
export function replace(test, name, value) {
  if (!originals.has(name)) originals.set(name, Object.getOwnPropertyDescriptor(globalThis, name));
  const original = originals.get(name);
  Object.defineProperty(globalThis, name, { value, configurable: true, writable: true });
  test.after(() => (original ? Object.defineProperty(globalThis, name, original) : delete globalThis[name]));
}

/** Let all timers run faster, and return the delays that were asked for. */
export function hurry(test, factor) {
  const delays = [];
  const real = globalThis.setTimeout;
  replace(test, "setTimeout", (action, ms, ...rest) => {
    delays.push(ms);
    return real(action, ms / factor, ...rest);
  });
  return delays;
}

/** Collect what is said on the console. */
export function listen(test) {
  const lines = [];
  test.mock.method(console, "warn", (...words) => lines.push(words.join(" ")));
  return lines;
}

export function sleep(ms) {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** Wait until something holds, for at most 10 s. */
export async function until(condition) {
  for (const end = performance.now() + 10_000; !condition(); await sleep(5)) {
    if (performance.now() > end) throw new Error(`this did not happen in time: ${condition}`);
  }
}
