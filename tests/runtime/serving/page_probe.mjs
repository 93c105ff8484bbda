// Drives the page of `qpert serve` in Chromium for test_page.py: what to do on stdin, what was seen on stdout, both JSON.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';

const { chromium } = createRequire(new URL('../../../examples/web/package.json', import.meta.url))('playwright-core');
const FLAGS = ['--no-sandbox', '--disable-dev-shm-usage', '--disable-gpu', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync'];
const PATIENCE = 120_000; // a shared machine
const request = JSON.parse(readFileSync(0, 'utf8'));
const browser = await chromium.launch({ executablePath: request.chromium, args: FLAGS });
const errors = [];

async function open({ phone = false, dark = false } = {}) {
  const context = await browser.newContext({
    viewport: phone ? { width: 390, height: 844 } : { width: 1280, height: 900 },
    colorScheme: dark ? 'dark' : 'light', hasTouch: phone, isMobile: phone, reducedMotion: 'reduce',
  });
  context.setDefaultTimeout(PATIENCE);
  const page = await context.newPage();
  page.on('pageerror', (error) => errors.push(error.stack));
  await page.goto(request.url);
  await page.waitForFunction(() => document.getElementById('about').textContent !== '…');
  return page;
}

/** What is found for a sentence and a filter, and what the page says of it. */
async function search(page, text, where) {
  await page.fill('#text', text);
  if (where !== null) await page.fill('#where', where);
  await page.click('#go');
  await page.waitForFunction(() => !document.getElementById('go').disabled);
  return page.evaluate(() => ({
    names: [...document.querySelectorAll('#results h2')].map((one) => one.textContent),
    status: document.getElementById('status').textContent,
    fault: document.getElementById('where-error').textContent,
    invalid: document.getElementById('where').getAttribute('aria-invalid') === 'true',
    focused: document.activeElement.id,
  }));
}

const tab = (page, name) => page.click(`#tab-${name}`);
const seen = { errors };
const page = await open();
seen.filterable = await page.isVisible('#where');
seen.hint = await page.textContent('#fields');
if (seen.filterable) {
  seen.all = await search(page, request.text, '');
  seen.some = await search(page, request.text, request.where);
  await page.waitForFunction(() => document.querySelectorAll('.picture img').length > 0);
  seen.wrong = await search(page, request.text, request.wrong);
  await page.type('#where', ' ');
  seen.cleared = await page.textContent('#where-error');
  await tab(page, 'match');
  seen.matching = await page.isVisible('#where');
  await tab(page, 'captions');
  seen.captions = await page.isVisible('#where');
  for (const [name, options] of Object.entries({ desk: {}, phone: { phone: true }, 'phone-dark': { phone: true, dark: true } })) {
    const shown = await open(options);
    await search(shown, request.text, request.where);
    await shown.waitForFunction(() => document.querySelectorAll('.picture img').length > 0);
    await search(shown, request.text, request.wrong);
    seen[`overflow ${name}`] = await shown.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
    await shown.screenshot({ path: `${request.folder}/serve-${name}.png`, fullPage: true });
  }
}
await browser.close();
console.log(JSON.stringify(seen));
