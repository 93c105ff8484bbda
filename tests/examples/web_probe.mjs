// Drives the built page in Chromium for test_web.py: what to do on stdin, what was seen on stdout, both JSON.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';

const { chromium } = createRequire(new URL('../../examples/web/package.json', import.meta.url))('playwright-core');
const FLAGS = ['--no-sandbox', '--disable-dev-shm-usage', '--disable-quic', '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync'];
const WEBGPU = ['--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader', '--enable-features=Vulkan', '--use-vulkan=swiftshader'];
const request = JSON.parse(readFileSync(0, 'utf8'));
const PATIENCE = request.task === 'webgpu' ? 900_000 : 240_000; // a shared machine, and for WebGPU a simulated adapter

const browser = await chromium.launch({
  executablePath: request.chromium, args: [...FLAGS, ...(request.task === 'webgpu' ? WEBGPU : ['--disable-gpu'])],
});
const seen = { requests: [], errors: [] };

async function open({ phone = false, dark = false, query = '', before = async () => {} } = {}) {
  const context = await browser.newContext({
    viewport: phone ? { width: 390, height: 844 } : { width: 1280, height: 900 },
    colorScheme: dark ? 'dark' : 'light', hasTouch: phone, isMobile: phone, reducedMotion: 'reduce',
  });
  context.setDefaultTimeout(PATIENCE);
  const page = await context.newPage();
  page.on('request', (one) => seen.requests.push(one.url()));
  page.on('pageerror', (error) => seen.errors.push(error.stack));
  page.on('console', (message) => message.type() === 'error' && seen.errors.push(message.text()));
  await before(page);
  await page.goto(request.url + query);
  return page;
}

const ended = (page) => page.waitForSelector('body[data-state=ready], body[data-state=failed]', { state: 'attached' });
const settled = (page) => page.waitForSelector('body[data-settled=true]');
const shoot = (page, name) => page.screenshot({ path: `${request.folder}/${name}.png`, fullPage: true });

/** All that the page says of the current picture, sentence and boxes. */
const look = (page) => page.evaluate(() => ({
  boxes: [...document.querySelectorAll('#stage .box')].map((box) => box.dataset.box.split(',').map(Number)),
  alpha: window.qpert.state.alpha,
  picture: window.qpert.state.picture.name,
  names: window.qpert.state.pictures.map((picture) => picture.name),
  texts: window.qpert.state.sentences.map((sentence) => sentence.text),
  sentence: window.qpert.state.sentence.text,
  scores: window.qpert.scores(),
  sentences: [...document.querySelectorAll('#sentences li')].map((row) => [row.dataset.key, Number(row.dataset.score), row.querySelector('.move').textContent]),
  tiles: [...document.querySelectorAll('#pictures li')].map((tile) => [tile.dataset.name, Number(tile.dataset.score)]),
  shares: document.getElementById('share').dataset.shares.split(',').map(Number),
  place: document.getElementById('place').textContent,
}));

/** Where on the screen a place of the picture is, in shares of its sides. */
async function at(page, x, y) {
  const area = await page.locator('#stage .boxes').boundingBox();
  return [area.x + x * area.width, area.y + y * area.height];
}

async function draw(page, [x1, y1, x2, y2]) {
  await page.mouse.move(...(await at(page, x1, y1)));
  await page.mouse.down();
  await page.mouse.move(...(await at(page, (x1 + x2) / 2, y2)), { steps: 3 });
  await page.mouse.move(...(await at(page, x2, y2)), { steps: 3 });
  await page.mouse.up();
  await settled(page);
}

const tasks = {
  async use() {
    const answer = {};
    const page = await open({
      before: (one) => one.addInitScript(() => {
        window.steps = [];
        document.addEventListener('DOMContentLoaded', () => {
          const text = document.getElementById('loading-text'), bar = document.getElementById('loading-bar');
          new MutationObserver(() => window.steps.push([text.textContent, bar.hasAttribute('value') ? bar.value : null]))
            .observe(document.querySelector('.loading'), { subtree: true, childList: true, attributes: true, characterData: true });
        });
      }),
    });
    await ended(page);
    answer.steps = await page.evaluate(() => window.steps);
    answer.stock = await look(page);
    answer.isolated = await page.evaluate(() => window.crossOriginIsolated);
    await shoot(page, 'light-start');
    const [x1, y1, x2, y2] = request.box;
    await draw(page, request.box);
    answer.drawn = await look(page);
    await page.getByRole('radio', { name: 'Best match' }).click();
    answer.match = await look(page);
    await page.getByRole('radio', { name: 'Box 1' }).click();
    await page.fill('#alpha', String(answer.stock.alpha / 2));
    await settled(page);
    answer.weaker = await look(page);
    await page.fill('#alpha', '0');
    await settled(page);
    answer.none = await look(page);
    await page.fill('#alpha', String(answer.stock.alpha));
    await settled(page);
    await draw(page, y1 > 0.4 ? [0.05, 0.05, 0.3, 0.25] : [0.05, 0.7, 0.3, 0.9]);
    answer.two = await look(page);
    await shoot(page, 'light-two-boxes');
    await page.locator('#stage .box').nth(1).focus();
    for (const key of ['ArrowRight', 'ArrowDown', 'Shift+ArrowRight', 'Shift+ArrowDown']) await page.keyboard.press(key);
    await settled(page);
    answer.keys = await look(page);
    await page.keyboard.press('Delete');
    await settled(page);
    answer.deleted = await look(page);
    await page.mouse.move(...(await at(page, (x1 + x2) / 2, (y1 + y2) / 2))); // moves the box, and does not draw another
    await page.mouse.down();
    await page.mouse.move(...(await at(page, (x1 + x2) / 2 - 0.1, (y1 + y2) / 2)), { steps: 4 });
    await page.mouse.up();
    await settled(page);
    answer.moved = await look(page);
    await page.mouse.click(...(await at(page, 0.99, y1 > 0.4 ? 0.02 : 0.98))); // a click is no box
    answer.clicked = await look(page);
    await page.fill('#sentence', request.sentence);
    await page.keyboard.press('Enter');
    await page.waitForFunction((text) => window.qpert.state.sentence.text === text, request.sentence);
    answer.typed = await look(page);
    answer.itm = await page.evaluate(({ tokens, boxes, size }) => window.qpert.ask('itm', { tokens, boxes, size, texts: window.qpert.state.sentences.map(({ text }) => text) }),
      await page.evaluateHandle(() => ({ ...window.qpert.state.picture })));
    await page.setInputFiles('#files', request.photographs);
    await page.waitForFunction((count) => window.qpert.state.pictures.length === count, answer.stock.names.length + request.photographs.length);
    await settled(page);
    answer.photographs = await look(page);
    answer.notes = {};
    for (const file of request.damaged) {
      await page.setInputFiles('#files', [file]);
      answer.notes[file] = await page.locator('#notes p').last().textContent();
      await page.locator('#notes p').last().click();
    }
    await page.evaluate((text) => { document.getElementById('sentence').value = text; }, 'word '.repeat(10_000));
    await page.click('#new-sentence button');
    answer.notes['10,000 words'] = await page.locator('#notes p').last().textContent();
    answer.after = await look(page);
    return answer;
  },

  async phone() {
    const page = await open({ phone: true, dark: true });
    await ended(page);
    const overflow = () => page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
    const answer = { overflow: [await overflow()] };
    await shoot(page, 'phone-dark-start');
    await page.locator('#stage').scrollIntoViewIfNeeded();
    const touch = await page.context().newCDPSession(page), [x1, y1, x2, y2] = request.box;
    const finger = async (type, place) => {
      const [x, y] = place ?? [];
      await touch.send('Input.dispatchTouchEvent', { type, touchPoints: place ? [{ x, y }] : [] });
    };
    await finger('touchStart', await at(page, x1, y1));
    for (const share of [0.3, 0.6, 1]) await finger('touchMove', await at(page, x1 + (x2 - x1) * share, y1 + (y2 - y1) * share));
    await finger('touchEnd');
    await settled(page);
    answer.drawn = await look(page);
    answer.overflow.push(await overflow());
    answer.small = await page.evaluate(() => [...document.querySelectorAll('main button, main input[type=range], .add')]
      .filter((one) => one.offsetParent && one.getBoundingClientRect().height < 24 && !one.classList.contains('box')).map((one) => one.outerHTML));
    await shoot(page, 'phone-dark');
    return answer;
  },

  async failures() {
    const answer = {};
    for (const [name, { file, status, body }] of Object.entries(request.failures)) {
      let broken = true;
      const page = await open({
        before: (one) => one.route(`**/${file}`, (route) => {
          if (!broken) return route.continue();
          return status === 0 ? route.abort() : route.fulfill({ status, body });
        }),
      });
      await ended(page);
      answer[name] = { state: await page.getAttribute('body', 'data-state'), text: await page.textContent('#failed-text') };
      if (name === request.retry) {
        await shoot(page, 'light-failed');
        broken = false;
        await page.click('#again');
        await page.waitForSelector('body[data-state=ready]');
        answer[name].again = true;
      }
      await page.context().close();
    }
    return answer;
  },

  async webgpu() {
    const few = async (page) => page.route('**/page.json', async (route) => {
      const answer = await route.fetch(), values = await answer.json();
      values.pictures = [values.pictures[values.start.picture]];
      values.sentences = [values.start.sentence];
      values.start.picture = 0;
      await route.fulfill({ json: values });
    });
    const page = await open({ query: '?provider=webgpu', before: few });
    const adapter = await page.evaluate(async () => Boolean(await navigator.gpu?.requestAdapter()));
    if (!adapter) return { adapter };
    await ended(page);
    const state = await page.getAttribute('body', 'data-state');
    if (state === 'failed') return { adapter, state, text: await page.textContent('#failed-text') };
    await page.click('#add-box'); // one box at once: a drawn one grows, and each step takes SwiftShader a quarter of a minute
    await settled(page);
    return { adapter, state, drawn: await look(page) };
  },
};

try {
  const answer = await tasks[request.task]();
  console.log(JSON.stringify({ ...answer, ...seen }));
} finally {
  await browser.close();
}
