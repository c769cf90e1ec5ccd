/** The client of Attolytics: sends events, and loses none on the way. */
export class Attolytics {
  constructor(options: Options);

  /**
   * Take an event; it is sent soon. Never throws.
   *
   * @param event its columns
   * @param table another table than that of the options
   * @returns whether it was taken: not when sending is off, nor what cannot be written as JSON
   */
  send(event?: object, table?: string): boolean;

  /**
   * Send what is waiting now. Resolves when all of it has its verdict, however long that takes, or when sending is
   * switched off.
   */
  flush(): Promise<void>;

  /** Stop sending and taking events. What has no verdict stays in the storage, for the next client. */
  stop(): void;

  /** Throw away all events of this app that are not sent yet, also those of other tabs. */
  forget(): void;

  /** Whether events are taken and sent. Set it when consent is given, or withdrawn (then `forget`, too). */
  get enabled(): boolean;
  set enabled(enabled: boolean);

  /** How many events wait for their verdict. */
  get pending(): number;

  /** How many events were thrown away because the queue was full. */
  get dropped(): number;
}

export interface Options {
  /** The server: `https://events.example.com`. */
  url: string;
  /** The id of the app, as in the schema file. */
  app: string;
  /** The app's secret key. On a web page it is not secret. */
  key: string;
  /** The table of events for which `send` names none. */
  table?: string;
  /** Columns of every event. */
  always?: object;
  /** The column for the time when `send` was called, or none. Default: `"time"`. */
  time?: string | false;
  /**
   * The column for an id that is made up for each event, or none. Default: `"id"`. In the schema it is `unique: true`,
   * so that an event is stored once, however often it has to be sent. With `false`, what is sent while the page is
   * left counts as sent, unless an answer comes; and an event may be stored twice when an answer is lost.
   */
  id?: string | false;

  /** Events are sent after so many milliseconds. Default: 2,000. */
  waitMs?: number;
  /** Or as soon as there are so many; no request has more. Default: 50. */
  batchEvents?: number;
  /** Or as soon as they have so many bytes. Default: 32,000. */
  batchBytes?: number;
  /** How large the queue may grow; then the oldest events are dropped. Default: 1,000,000. */
  queueBytes?: number;
  /** A request without an answer is given up after so many milliseconds. Default: 30,000. */
  timeoutMs?: number;

  /** Where events are kept. Default: `localStorage` in a browser, memory elsewhere; `null` is memory, too. */
  storage?: Pick<Storage, "length" | "key" | "getItem" | "setItem" | "removeItem"> | null;
  /** `false` as long as there is no consent: nothing is stored, nothing sent. Default: `true`. */
  enabled?: boolean;
  /** Called with events that the server refused, and its reason. They are not sent again. */
  onRefused?(events: Record<string, unknown>[], reason: string): void;
}
