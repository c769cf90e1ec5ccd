// Compiles the data model and prints the SQL of some queries as JSON, with its parameters filled in.
//
//   npm install --no-save --ignore-scripts @cubejs-backend/schema-compiler && node check.mjs
//
// It needs no running Cube and no database.

import { readFile, readdir } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

// Packages are looked for in the current directory, so that they need not be installed beside the model.
const require = createRequire(join(process.cwd(), 'check.mjs'));
const { PostgresQuery, prepareCompiler } = require('@cubejs-backend/schema-compiler');

const QUERIES = [
  {
    measures: ['events.count', 'events.users', 'events.events_per_user', 'events.average_score'],
    dimensions: ['events.platform'],
    timeDimensions: [
      { dimension: 'events.time', granularity: 'day', dateRange: ['2019-01-01', '2019-12-31'] },
    ],
    segments: ['events.with_score'],
  },
  {
    measures: ['events.users', 'events.game_starts', 'events.highest_score'],
    dimensions: ['events.event_type', 'events.version'],
    filters: [{ member: 'events.platform', operator: 'equals', values: ['linux'] }],
  },
  {
    measures: ['purchases.count', 'purchases.revenue', 'purchases.average_price', 'purchases.gifts'],
    dimensions: ['purchases.product', 'purchases.currency'],
  },
];

// What the pre-aggregations must be found to answer.
const ROLLED_UP = [
  {
    measures: ['events.count', 'events.game_starts'],
    dimensions: ['events.platform'],
    timeDimensions: [
      { dimension: 'events.time', granularity: 'day', dateRange: ['2019-04-01', '2019-04-30'] },
    ],
  },
  {
    measures: ['purchases.revenue'],
    dimensions: ['purchases.product'],
    timeDimensions: [
      { dimension: 'purchases.received_at', granularity: 'month', dateRange: ['2019-04-01', '2019-04-30'] },
    ],
  },
];

const cubes = join(dirname(fileURLToPath(import.meta.url)), 'model', 'cubes');

async function dataSchemaFiles() {
  const names = (await readdir(cubes)).sort();
  return Promise.all(
    names.map(async (fileName) => ({ fileName, content: await readFile(join(cubes, fileName), 'utf8') })),
  );
}

function withParameters([sql, parameters]) {
  const quote = (value) => `'${String(value).replaceAll("'", "''")}'`;
  return sql.replace(/\$(\d+)/g, (_, number) => quote(parameters[number - 1]));
}

// Cube's native part, a large download, is needed for Jinja templates, which this model has none of, and for
// the newer one of its two planners.
const nativeInstance = { newJinjaEngine: () => ({}) };
const compilers = prepareCompiler(
  { localPath: () => cubes, dataSchemaFiles },
  { adapter: 'postgres', nativeInstance },
);
await compilers.compiler.compile();

const makeQuery = (query) =>
  new PostgresQuery(compilers, { timezone: 'UTC', useNativeSqlPlanner: false, ...query });

const queries = QUERIES.map((query) => withParameters(makeQuery(query).buildSqlAndParams()));
const rollups = ROLLED_UP.map((query) => {
  const used = makeQuery(query).preAggregations.preAggregationsDescription();
  if (used.length !== 1) {
    throw new Error(`no pre-aggregation answers ${JSON.stringify(query)}`);
  }
  const { preAggregationId, sql } = used[0];
  return { preAggregationId, sql: withParameters(sql) };
});
console.log(JSON.stringify({ queries, rollups }, null, 2));
