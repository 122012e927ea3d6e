// Pictures of the dashboards from a record of `python -m examples.observe --seconds 300 --record RECORD`:
//
//     npm install --legacy-peer-deps --ignore-scripts
//     node render.mjs RECORD OUT [RATE_INTERVAL]
//
// Grafana's panels run in a headless Chromium (CHROMIUM, default /usr/bin/chromium).
import { mkdirSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { build } from 'esbuild';
import { chromium } from 'playwright-core';

const here = dirname(fileURLToPath(import.meta.url));
const [record, out, rate = '1m'] = process.argv.slice(2);
const boards = process.env.BOARDS ?? join(here, '..');
const shown = JSON.parse(readFileSync(record, 'utf8'));
const times = Object.values(shown).flatMap((all) => all.flatMap((it) => [it.values[0][0], it.values.at(-1)[0]]));
const [start, end] = [times.reduce((a, b) => Math.min(a, b)), times.reduce((a, b) => Math.max(a, b))];

const bundle = await build({
  entryPoints: [join(here, 'page.jsx')], bundle: true, write: false, format: 'iife', jsx: 'automatic', minify: true,
  define: { 'process.env.NODE_ENV': '"production"', global: 'window' }, logLevel: 'error', outdir: '/',
  loader: { '.svg': 'dataurl', '.png': 'dataurl', '.woff2': 'dataurl', '.ttf': 'dataurl' },
});
const script = bundle.outputFiles.find((it) => it.path.endsWith('.js')).text;
const style = bundle.outputFiles.find((it) => it.path.endsWith('.css'))?.text ?? '';

const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage'],
});
mkdirSync(out, { recursive: true });
for (const name of ['overview', 'adapters', 'engine', 'capacity']) {
  const board = JSON.parse(readFileSync(join(boards, `${name}.json`), 'utf8'));
  const page = await browser.newPage({ viewport: { width: 1608, height: 1200 } });
  page.on('pageerror', (error) => console.error(name, error.message));
  // A page with an address, since Grafana's code wants a local storage. Nothing leaves this machine.
  const body = `<!doctype html><style>${style}</style><div id="root"></div>`;
  await page.route('**/*', (route) => route.request().isNavigationRequest()
    ? route.fulfill({ contentType: 'text/html', body }) : route.abort());
  await page.goto('http://graft.invalid/');
  await page.evaluate((value) => { window.graft = value; }, { board, shown, rate, start, end, step: 2 });
  await page.addScriptTag({ content: script });
  await page.waitForSelector('#board');
  await page.waitForTimeout(2500);
  await page.locator('#board').screenshot({ path: join(out, `graft-${name}.png`) });
  console.log(join(out, `graft-${name}.png`));
  await page.close();
}
await browser.close();
